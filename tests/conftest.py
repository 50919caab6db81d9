"""Fixtures that tests of all floors share. Plain helpers stand in tiny.py."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import audit
import dp_sgd
import train
from runtime import distributed
from tiny import FLAGS, arguments, write_images

# ---- broken copies of the private step, and faults around it -----------------------------------

SHUFFLING = "shuffling accounted as Poisson"
PHYSICAL_RATE = "accountant fed the physical batch size"
PUBLISHED_SEED = "a published seed"


def shuffling(chunk: int) -> audit.Mechanism:
    """Correct code whose batches are pieces of a shuffled order."""
    batches = []

    def sample(plan: dp_sgd.PrivacyPlan, rng: np.random.Generator) -> torch.Tensor:
        if not batches:
            batches.extend(audit.shuffled_batches(plan, rng))
        return batches.pop(0)

    return replace(audit.correct(chunk), sample=sample)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mechanism", default="correct code",
                     choices=[*audit.MECHANISMS, SHUFFLING, PHYSICAL_RATE, PUBLISHED_SEED],
                     help="put a broken copy of the private step (audit.py) under the tests")
    parser.addoption("--trees", type=int, default=200,
                     help="random trees of files to load (tests/datasets/test_random_trees.py)")


@pytest.fixture(scope="session", autouse=True)
def in_foreground() -> Iterator[None]:
    """Ctrl-C works as in a terminal: jobs in the background are told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> str:
    """The name of the private step under test."""
    return request.config.getoption("--mechanism")


@pytest.fixture
def mechanism(variant: str) -> Callable:
    """The private step under test: a function (chunk) -> audit.Mechanism."""
    return {**audit.MECHANISMS, SHUFFLING: shuffling}.get(variant, audit.correct)


@pytest.fixture
def new_generator(variant: str) -> Callable:
    """A function () -> the generator of a private run under test."""
    if variant == PUBLISHED_SEED:
        return lambda: np.random.default_rng(0)
    return dp_sgd.secure_generator


@pytest.fixture(autouse=True)
def sample_rate(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans take the rate of a chunk for the rate of a step, where that is the variant."""
    if variant == PHYSICAL_RATE:
        rate = property(lambda plan: audit.PHYSICAL_BATCH / plan.num_examples)
        monkeypatch.setattr(dp_sgd.PrivacyPlan, "sample_rate", rate)


# ---- tiny runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of runtime/fingerprint.py, in place of the one in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder / "dp-ldm"


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 public and 24 private images, and a public model."""
    folder = tmp_path_factory.mktemp("public")
    write_images(folder / "public-images", [6, 6], seed=0)
    write_images(folder / "private-images", [12, 12], seed=1)
    train.main(["--stage", "public", "--out", str(folder), "--public-data",
                str(folder / "public-images"), *FLAGS])
    return folder


@pytest.fixture(scope="session")
def private(public: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has spent epsilon 3."""
    folder = tmp_path_factory.mktemp("private")
    train.main(arguments(public, folder))
    return folder / "private-eps3.pt"


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """as_process(rank): what follows is done by this one of two processes."""
    return lambda rank: monkeypatch.setattr(distributed, "rank_and_world", lambda: (rank, 2))


@pytest.fixture
def full_disk() -> Callable:
    """full_disk(size): inside, no file can grow past so many bytes."""
    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def in_step() -> Callable:
    """in_step(k, action): do it in the k-th optimiser step, counted over all runs of the test.

    Returns a list that grows by one each step.
    """
    handles = []

    def at(k: int, action: Callable) -> list:
        steps = []

        def count(*details: object) -> None:
            steps.append(details)
            if len(steps) == k:
                action()

        handles.append(register_optimizer_step_pre_hook(count))
        return steps

    yield at
    for handle in handles:
        handle.remove()


# ---- what a run does ---------------------------------------------------------------------------

@pytest.fixture
def optimizer_steps() -> object:
    """The gradients seen at every step of any optimiser: a list of lists of tensors."""
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(
        [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]))
    yield seen
    handle.remove()


@pytest.fixture
def recorded() -> object:
    """A clipped_sum for train_private that records its calls (model, parameters, batch, C).

    With .stub set it computes nothing: every gradient is zero.
    """
    class Recorded(list):
        stub = False
        clipped_sum = staticmethod(dp_sgd.in_chunks(dp_sgd.clipped_gradient_sum, 3))

        def __call__(self, model, parameters, batch, C):
            self.append((model, parameters, batch, C))
            if self.stub:
                return {name: p.new_zeros(p.shape) for name, p in parameters.items()}
            return self.clipped_sum(model, parameters, batch, C)

    return Recorded()
