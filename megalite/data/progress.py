"""How far a long piece of work has come: a bar on a terminal, otherwise a plain line every few seconds; on stderr."""

import sys
import time

from tqdm import tqdm

REPORT_SECONDS = 5.0


class Progress:
    """`label`: what is being done, as in "tokenizing"; `total`, `start`: bytes to do, and done by an earlier run."""

    def __init__(self, label: str, total: int, *, start: int = 0, show: bool = True) -> None:
        self.label, self.total, self.start, self.done = label, total, start, start
        self.show = show
        self.began = self.reported = time.monotonic()
        terminal = show and sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=label, dynamic_ncols=True)
            if terminal
            else None
        )

    def set(self, done: int, **counts: int) -> None:
        """`done` bytes in all; counts: what else to show, such as documents=12; `tokens` also as a rate."""
        step, self.done = done - self.done, done
        now = time.monotonic()
        seconds = max(now - self.began, 1e-9)
        parts = [f"{value:,} {name}" for name, value in counts.items()]
        if "tokens" in counts:
            parts.append(f"{counts['tokens'] / seconds:,.0f} tokens/s")
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(parts), refresh=False)
            self.bar.update(step)
        elif self.show and now - self.reported >= REPORT_SECONDS:
            self.reported = now
            rate = (done - self.start) / seconds
            left = f", {(self.total - done) / rate:,.0f} s left" if rate else ""
            head = f"{self.label}: {done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
            print(", ".join([head, *parts]) + left, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
