"""How many images fit: a pure decision over probes, and a rehearsal that leaves everything as it was."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.data.store import plain_store
from utils.runtime import MemoryPeak, Runtime
from utils.structures import LabelStore, RunError, UserError
from utils.train.batchsize import Rehearsal, largest_batch, largest_batch_size
from utils.train.build import build_trainer

SIZES = {"budget": st.integers(1, 10_000), "limit": st.integers(1, 300), "step": st.sampled_from([1, 4])}


@given(fixed=st.integers(0, 500), each=st.integers(1, 400), dies=st.integers(1, 10_000), **SIZES)
def test_memory_that_grows_by_the_image_is_used_to_the_last(fixed, each, dies, budget, limit, step):
    limit = limit * step

    def probe(size: int) -> int | None:
        needed = fixed + each * size
        return None if needed > dies else needed

    fitting = [size for size in range(step, limit + 1, step) if fixed + each * size <= min(budget, dies)]
    chosen = largest_batch(probe, budget=budget, limit=limit, step=step)
    if not fitting:
        assert chosen is None
    elif budget <= dies:
        assert chosen == max(fitting)
    else:  # memory ends before the budget does, which the line cannot know
        assert chosen in fitting and chosen * 2 > max(fitting)


@given(seed=st.integers(0, 10_000), **SIZES)
def test_what_is_chosen_was_tried_and_fitted(seed, budget, limit, step):
    noise = np.random.default_rng(seed).uniform(0.7, 1.3, 400)
    limit = limit * step
    seen = {}

    def probe(size: int) -> int:
        seen[size] = int(50 * size * noise[size % 400])
        return seen[size]

    chosen = largest_batch(probe, budget=budget, limit=limit, step=step)
    if chosen is None:
        assert seen[step] > budget
    else:
        assert seen[chosen] <= budget
        assert chosen == max(size for size, needed in seen.items() if needed <= budget)
        assert chosen % step == 0 and chosen <= limit
    assert len(seen) < 25


@pytest.fixture
def parts(tiny):
    """What the choice is made of, from a built trainer."""
    trainer = build_trainer(tiny.options(batch_size=4))
    return {
        "model": trainer.step.model,
        "hyp": trainer.hyp,
        "options": trainer.options,
        "train": trainer.evaluator.batches.store,
        "val": trainer.evaluator.batches.store,
        "runtime": trainer.runtime,
    }


def test_where_nobody_counts_memory_it_is_16(parts, capsys):
    notes = []
    assert largest_batch_size(**parts, limit=100, step=1, note=notes.append) == 16
    assert notes == ["--batch-size -1: without a CUDA GPU that is 16"]


class SmallGpu(Runtime):
    """A CPU that says it has 10,000 bytes. A network takes 1,000, and an image 700; one that is evaluated takes 100."""

    free = 10_000
    when_trained, when_evaluated = 700, 100

    def free_memory(self) -> int:
        return self.free

    @contextmanager
    def memory_peak(self):
        peak, seen = MemoryPeak(), []
        honest = Rehearsal._noise

        def counted(rehearsal, images, side, **labels):
            seen.append((images, side))
            return honest(rehearsal, images, side, **labels)

        Rehearsal._noise = counted
        try:
            yield peak
        finally:
            Rehearsal._noise = honest
        ((images, side),) = seen
        if side == 64:
            peak.bytes, peak.kept = 1000 + self.when_trained * images, 1000
        else:
            assert side == 80  # padded
            peak.bytes = self.when_evaluated * images


def small_gpu() -> SmallGpu:
    return SmallGpu(device=torch.device("cpu"), amp_dtype=None, workers=0)


@pytest.mark.parametrize(("limit", "step", "chosen"), [(100, 1, 11), (100, 4, 8), (7, 1, 7)])
def test_on_a_gpu_nine_tenths_of_the_free_memory_are_used(parts, limit, step, chosen):
    notes = []
    parts["runtime"] = small_gpu()
    assert largest_batch_size(**parts, limit=limit, step=step, note=notes.append) == chosen
    assert notes == [f"--batch-size -1: {chosen}, of at most {limit}, for 90% of 0.0 GiB free"]


@pytest.mark.parametrize(("images_of_val", "chosen"), [(1, 11), (100, 8)])
def test_where_evaluation_takes_more_than_training_it_decides(parts, monkeypatch, images_of_val, chosen):
    """Twice as many images are evaluated at once, if there are so many; the weights of training are there as well."""
    parts["val"] = images(images_of_val)
    parts["runtime"] = small_gpu()
    monkeypatch.setattr(SmallGpu, "when_evaluated", 500)
    assert largest_batch_size(**parts, limit=100, step=1, note=print) == chosen


def images(count: int) -> LabelStore:
    """A split without labels."""
    return plain_store(np.full((count, 2), 64))


def test_no_size_is_compiled_for(parts, monkeypatch):
    monkeypatch.setattr(SmallGpu, "compiled", lambda self, model: pytest.fail("compiled") if self.compile else model)
    parts["runtime"] = replace(small_gpu(), compile=True)
    assert largest_batch_size(**parts, limit=4, step=4, note=print) == 4


def test_a_network_that_does_not_fit_at_all_is_refused(parts, monkeypatch):
    monkeypatch.setattr(SmallGpu, "free", 100)
    parts["runtime"] = small_gpu()
    with pytest.raises(UserError, match="not even 4 fit into the memory: lower --imgsz"):
        largest_batch_size(**parts, limit=100, step=4, note=print)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_rehearsal_leaves_network_and_random_state_as_they_were(parts, kind, random_states):
    parts["options"] = replace(parts["options"], optimizer=kind, multi_scale=True)
    before = {name: value.clone() for name, value in parts["model"].state_dict().items()}
    states = random_states()
    rehearsal = Rehearsal(**parts)
    rehearsal.evaluate(rehearsal.after_steps(3).average.model, 3)
    assert random_states() == states
    assert all(torch.equal(value, before[name]) for name, value in parts["model"].state_dict().items())
    assert all(parameter.grad is None for parameter in parts["model"].parameters())


@pytest.mark.parametrize(
    ("changes", "mosaic", "inputs", "side", "labels"),
    [
        ({}, 0.0, 5, 64, 4),  # of five images, as the four of the split have one label each
        ({}, 1.0, 5, 64, 16),
        ({"image_weights": True}, 1.0, 5, 64, 20),
        ({"rect": True}, 1.0, 5, 80, 4),
        ({"quad": True}, 1.0, 2, 128, 16),
    ],
)
def test_the_rehearsal_sees_the_largest_input_and_the_most_labels(parts, changes, mosaic, inputs, side, labels):
    parts["options"] = replace(parts["options"], **changes)
    parts["hyp"] = replace(parts["hyp"], mosaic=mosaic)
    batch = Rehearsal(**parts).batch(5)
    assert batch.images.shape == (inputs, 3, side, side)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (len(batch.boxes), len(batch.classes), len(batch.indices)) == (labels, labels, 5)
    sizes = (batch.boxes[:, 2:] - batch.boxes[:, :2]).numpy()
    assert np.all(sizes >= 0) and np.all(sizes <= 40)
    assert int(batch.image_of.max()) < inputs


@pytest.mark.parametrize(
    ("size", "error", "figure"),
    [
        (64, RuntimeError("upsample only supports output tensors with less than INT_MAX elements"), None),
        (64, torch.OutOfMemoryError("CUDA"), None),
        (64, RuntimeError("CUDA error: out of memory"), None),
        (1, RuntimeError("a bug of ours"), RuntimeError),
        (4, RuntimeError("CUDA error: out of memory"), RunError),
    ],
)
@pytest.mark.parametrize("part", ["after_steps", "evaluate"])
def test_a_batch_that_no_kernel_takes_does_not_fit(parts, monkeypatch, part, size, error, figure):
    parts["runtime"] = small_gpu()
    monkeypatch.setattr(Rehearsal, part, lambda *_: (_ for _ in ()).throw(error))
    if figure:
        with pytest.raises(figure, match=r"a bug of ours|out of memory: lower --batch-size \(now 4\) or --imgsz"):
            Rehearsal(**parts).peak_bytes(size)
    else:
        assert Rehearsal(**parts).peak_bytes(size) is None


def test_a_gpu_that_is_full_before_anything_begins_is_one_line(parts, monkeypatch):
    def refuse(gpu):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(SmallGpu, "free_memory", refuse)
    parts["runtime"] = small_gpu()
    with pytest.raises(RunError, match=r"^out of memory: "):
        largest_batch_size(**parts, limit=100, step=1, note=print)
