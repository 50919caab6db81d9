"""Random numbers of a private run, drawn ahead while the model computes."""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dp_sgd import secure_generator
from runtime.distributed import rank_and_world

BLOCK = 2**16   # numbers that are drawn at a time: some milliseconds


class Ahead:
    """A generator with its next `count` standard normal numbers drawn by a helper thread."""

    def __init__(self, rng: np.random.Generator, count: int):
        self.rng, self.left_over = rng, np.empty(0)
        self.worker = ThreadPoolExecutor(1)
        self.blocks = deque(self.draw() for _ in range(-(-count // BLOCK)))

    def draw(self) -> object:
        return self.worker.submit(self.rng.standard_normal, BLOCK)

    def random(self, size: int | Sequence[int]) -> np.ndarray:
        return self.rng.random(size)

    def standard_normal(self, size: Sequence[int], dtype: type = np.float64) -> np.ndarray:
        count, taken = math.prod(size), [self.left_over]
        while sum(map(len, taken)) < count:
            self.blocks.append(self.draw())
            taken.append(self.blocks.popleft().result())
        numbers, self.left_over = np.split(np.concatenate(taken), [count])
        return numbers.astype(dtype).reshape(size)


def private_generator(insecure_seed: int, first_step: int, count: int) -> object:
    """The generator of a private run, with about `count` normal numbers a step.

    From insecure_seed 0 on the numbers follow the seed, the step to begin with and the process.
    """
    if insecure_seed >= 0:
        return secure_generator((insecure_seed + first_step, rank_and_world()[0]))
    return Ahead(secure_generator(), count)
