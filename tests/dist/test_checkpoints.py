"""Checkpoints across layouts, to the bit; kill -9 at any moment of a save; two runs in one folder."""

import json
import subprocess
import sys

import pytest
import torch

from megalite.training.checkpoint_reader import Checkpoint, find_checkpoint
from tests.dist.conftest import REPOSITORY, environment

pytestmark = pytest.mark.dist

RELATIVE = 1e-5  # of a loss, for sums in another order
# name: ranks, kind of ZeRO, layout
SAVE = {
    "ZeRO-1 tp2 pp2": (4, "1", {"tensor": 2, "pipeline": 2}),
    "ZeRO-3 dp4": (4, "3", {}),
    "ZeRO-3 tp2 pp2": (8, "3", {"tensor": 2, "pipeline": 2, "sequence": True}),
    "1 rank": (1, "0", {}),
}
LOAD = {
    "1 rank": (1, "1", {}),
    "ZeRO-0 dp2": (2, "0", {}),
    "ZeRO-2 tp2": (4, "2", {"tensor": 2}),
    "ZeRO-3 pp2 virtual 2": (4, "3", {"pipeline": 2, "virtual": 2}),
    "ZeRO-3 dp3": (3, "3", {}),
    "ZeRO-1 offload": (2, "1_offload", {}),
    "ZeRO-2 bf16": (2, "2", {}, "bf16"),
}


def ranks_do(what: str, folder, argument, timeout: float):
    command = [sys.executable, "-m", "tests.dist.checkpoint_ranks", what, str(folder), json.dumps(argument)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    return folder, ranks_do("matrix", folder, {"save": SAVE, "load": LOAD}, 900)


@pytest.mark.parametrize("load", LOAD)
@pytest.mark.parametrize("save", SAVE)
def test_any_layout_goes_on_from_any_other(matrix, save, load):
    folder, losses = matrix
    relative = 2e-3 if "bf16" in load else RELATIVE
    assert losses["load"][load][save] == pytest.approx(losses["save"][save], rel=relative, abs=0)
    assert losses["save"][save] == pytest.approx(losses["save"]["1 rank"], rel=RELATIVE, abs=0)
    # What was loaded, and saved again before a step, is what was saved, to the bit.
    first, again = (Checkpoint(find_checkpoint(folder / each)) for each in (f"saved/{save}", f"loaded/{load}/{save}"))
    assert first.index.keys() == again.index.keys()
    assert {key: first.state[key] for key in first.state} == {key: again.state[key] for key in first.state}
    for name in first.index:
        expected = first.tensors(name)
        for key, tensor in again.tensors(name).items():
            assert torch.equal(tensor, expected[key]), (name, key)
            assert tensor.any(), (name, key)


def test_a_new_run_from_weights_alone(tmp_path):
    plan = {"ZeRO-0": (1, "0", {}), "ZeRO-1 dp2": (2, "1", {}), "ZeRO-3 dp3": (3, "3", {})}
    losses = ranks_do("init_from", tmp_path, plan, 300)
    source = Checkpoint(find_checkpoint(tmp_path / "source"))
    for name in plan:
        assert losses[name] == pytest.approx(losses["ZeRO-0"], rel=RELATIVE, abs=0)
        new = Checkpoint(find_checkpoint(tmp_path / name))
        assert (new.step, new.state["adam_step"], new.state["data"]["consumed_samples"]) == (0, 0, 0)
        for parameter, weight in new.weights():
            assert torch.equal(weight, source.tensors(parameter)["weight"]), (name, parameter)
            assert not new.tensors(parameter)["exp_avg"].any()


LAYOUTS = [(3, "1", {}), (4, "3", {"pipeline": 2})]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["ZeRO-1 dp3", "ZeRO-3 pp2"])
def test_all_ranks_hear_at_one_step_that_one_cannot_write(tmp_path, layout):
    told = ranks_do("fail_to_save", tmp_path, {"fault": "folder", "layout": layout}, 100)
    assert all(each == told[0] for each in told)
    assert (told[0]["error"], told[0]["everywhere"]) == ("UserError", True)
    assert told[0]["said"].startswith(f"cannot write {tmp_path}/out/step-1.tmp/no/such/file: No such file")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["latest", "step-0"]
    Checkpoint(tmp_path / "out/step-0").verify()


def test_a_defect_in_one_ranks_thread_ends_the_run(tmp_path):
    """At once: the others' threads wait for it, and would be asked at the next save."""
    told = ranks_do("fail_to_save", tmp_path, {"fault": "defect", "layout": LAYOUTS[0]}, 100)
    assert [each["error"] for each in told] == ["RuntimeError", "AttributeError", "RuntimeError"]
    Checkpoint(find_checkpoint(tmp_path / "out")).verify()


def test_killed_while_saving_the_last_good_one_survives(tmp_path):
    seen = ranks_do("kill_while_saving", tmp_path / "out", 20, 300)
    newest = [steps[-1] for _, *steps in seen]
    assert newest == sorted(newest)
    assert newest[-1] >= 20
    # Three stay; more, where the kill came before the oldest went.
    assert all(len(steps) >= 3 and steps == list(range(steps[0], steps[-1] + 1)) for _, *steps in seen[2:])
    assert sum(unfinished for unfinished, *_ in seen) > 3  # it was inside a save now and then


def test_killed_at_random_moments_resumes_to_the_bit(tmp_path):
    found = ranks_do("kill_and_resume", tmp_path / "out", {"steps": 16, "kills": 6}, 400)
    whole = dict(found["whole"])
    assert len(whole) == 16
    assert found["kills"] >= 3
    assert {step for step, _ in found["killed"]} == set(whole)
    assert all(loss == whole[step] for step, loss in found["killed"])
