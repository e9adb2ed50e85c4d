"""The learning rate as a pure function of the step, so that a resumed run cannot restart it."""

import math

from megalite.config import TrainingConfig


def learning_rate_at(step: int, training: TrainingConfig, max_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 1.

    Linear warm-up over warmup_steps, then by lr_schedule down to min_learning_rate, which the last step reaches.
    wsd: MiniCPM (arXiv:2404.06395), with a linear decay.
    """
    peak, low, warmup = training.learning_rate, training.min_learning_rate, training.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if training.lr_schedule == "constant":
        return peak
    if training.lr_schedule == "wsd":
        decay = wsd_decay_steps(training, max_steps)
        return peak - (peak - low) * max(0, step - (max_steps - decay)) / decay
    done = (step - warmup) / max(1, max_steps - warmup)
    if training.lr_schedule == "linear":
        return peak - (peak - low) * done
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))


def wsd_decay_steps(training: TrainingConfig, max_steps: int) -> int:
    """Steps of wsd's decay; by default a tenth of the run, and never into the warm-up."""
    return training.decay_steps or max(1, min(round(0.1 * max_steps), max_steps - training.warmup_steps))
