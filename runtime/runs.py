"""A run and its files: begin, announce, save, stop, resume."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from accountant import in_words
from dp_sgd import Batch, PrivacyPlan, Tensors, make_plan
from ldm import EMA, LatentDiffusion
from runtime import ledger
from runtime.checkpoints import build_model, load_checkpoint, save_checkpoint, shapes_only
from runtime.classes import match_classes, new_class_embedder
from runtime.config import Config
from runtime.describe import num_parameters
from runtime.distributed import is_first_process
from runtime.files import locked
from runtime.fingerprint import can_check, each_digest, forget, new_handle, set_digest
from runtime.outputs import check_outputs, check_suffix
from runtime.weights import base_digests, check_not_needed
from variants.lora import add_lora
from variants.trainable import private_parameter_names

# ---- names of files ----------------------------------------------------------------------------

@dataclass
class Files:
    """Where a run reads and writes."""
    public: Path       # the public model
    target: Path       # what this run makes
    unfinished: Path   # what an interrupted private run left
    outputs: list[Path]   # all that it may write
    inputs: list[str]     # what it reads, if these are paths

    @classmethod
    def of(cls, config: Config) -> "Files":
        public = Path(config.run.public_checkpoint or config.folder / "public.pt")
        private = config.folder / f"private-eps{config.private.epsilon:g}.pt"
        target = public if config.stage == "public" else private
        unfinished = target.with_suffix(".unfinished.pt")
        inputs = [config.data.public, config.data.private, config.run.pretrained]
        of_public = [public, public.with_suffix(".png"), autoencoder_beside(public)]
        if config.stage == "public":
            outputs = of_public
        else:
            outputs = [target, target.with_suffix(".png"), ledger.privacy_json(target),
                       unfinished, ledger.privacy_json(unfinished)]
            if public.exists():
                inputs.append(str(public))
            elif not config.run.pretrained:   # the public stage comes first
                outputs += of_public
        return cls(public, target, unfinished, outputs, inputs)

    @contextmanager
    def locked(self, config: Config) -> Iterator[bool]:
        """Inside, no other run makes the same target. Yields whether it is complete already.

        ValueError as of `is_complete` and `check`, or if another run makes it.
        """
        resume, overwrite = config.run.resume, config.run.overwrite
        if resume and not overwrite and config.stage == "private" and self.is_complete(config):
            yield True
            return
        check_suffix(self.target, ".pt")   # of --public-checkpoint
        check_outputs(self.outputs, self.inputs)
        with locked(self.target):
            self.check(resume, overwrite)
            yield False

    def is_complete(self, config: Config) -> bool:
        """Whether nothing is left to resume, which is printed.

        ValueError if what lies there is not what the private run of these settings makes.
        """
        if not self.target.exists():
            return False
        metadata = load_checkpoint(self.target)[1]
        if "plan" not in metadata or "training" in metadata:
            raise ValueError(f"{self.target} is no finished private run: give --overwrite to "
                             "replace it, or another --out")
        check_same(self.target, config, of_private_stage(config, metadata), REPLACE)
        print(f"{self.target} is complete: there is nothing to resume")
        return True

    def check(self, resume: bool, overwrite: bool) -> None:
        """ValueError if this run would replace files that it was not told to replace."""
        if self.unfinished.exists() and not (resume or overwrite):
            raise ValueError(f"{self.unfinished} is an interrupted run: give --resume to go on, or "
                             "--overwrite to start anew")
        if self.target.exists() and not overwrite:
            raise ValueError(f"{self.target} exists: give --overwrite to replace it, or another "
                             "--out")
        if self.target.exists():
            check_not_needed(self.target)
        record = ledger.privacy_json(self.target)
        goes_on = resume and self.unfinished.exists()   # after a crash between record and target
        if record.exists() and not (self.target.exists() or goes_on or overwrite):
            raise ValueError(f"{record} is the record of a checkpoint that is no longer here: move "
                             "it too, or give --overwrite to replace it")


REPLACE = "go on with that, or give --overwrite or another --out"


def check_same(path: Path, config: Config, made: dict, advice: str) -> None:
    """ValueError if `config` has another setting than `made`, with which `path` was made."""
    if difference := config.changed(made):
        name, there, here = difference
        raise ValueError(f"{path} was made with {name} {there}, not {here}: {advice}")


def of_private_stage(config: Config, metadata: dict) -> dict:
    """The settings of a private checkpoint, but with the public data's path as `config` has it.

    They may have moved: no private run reads them, and the checkpoint has their digest.
    """
    made = metadata["config"]
    return {**made, "data": {**made["data"], "public": config.data.public}}


def autoencoder_beside(public: Path) -> Path:
    """Where the public stage that makes `public` keeps the autoencoder, its slower half."""
    return public.with_name("autoencoder.pt")


# ---- what a run starts from ---------------------------------------------------------------------

def check_captions(captions: list[str] | None, source: str, config: Config) -> None:
    """ValueError if a model of captions is given none; a line if it sees the start of some only."""
    if not config.has_captions:
        return
    if captions is None:
        raise ValueError(f"{source} has no captions: give data with captions (a folder with a "
                         "metadata.jsonl), or text.length 0 for a model of classes")
    if any(len(caption.encode()) > config.text.length for caption in captions):
        print(f"{source}: captions are cut to {config.text.length} bytes (text.length)")


def earlier_autoencoder(path: Path, config: Config, digest: str) -> nn.Module:
    """The autoencoder that a stopped public stage left in `path`.

    digest: of the public images. ValueError if it was made of other images or with other settings.
    """
    model, metadata = load_checkpoint(path, "autoencoder")
    counts = [*keys_of(config, "vae", "autoencoder"), ("public", "seed"), ("data", "image_size"),
              ("data", "channels")]
    check_same(path, config, with_settings(config, metadata["config"], counts), REPLACE)
    if metadata.get("public_digest") != digest:
        raise ValueError(f"{path} was made of other data: give --overwrite or another --out")
    print(f"taking the autoencoder from {path}")
    return model.vae


def check_public(path: Path, config: Config, made: dict) -> None:
    """ValueError if the user asks for another public model than the one that lies in OUT.

    made: the settings of its public stage. The private stage may be called without the flags of the
    public one. So what the preset sets is not asked for, unless it is another preset.
    """
    preset = Config.from_preset(config.preset)
    counts = [(table, key) for table, key in (*keys_of(config, "autoencoder", "public"),
                                              ("data", "public"))
              if config.preset != made.get("preset")
              or getattr(getattr(config, table), key) != getattr(getattr(preset, table), key)]
    check_same(path, config, with_settings(config, made, counts), "give another --out, or "
               f"--public-checkpoint {path} to take it as it is")


def keys_of(config: Config, *tables: str) -> list[tuple[str, str]]:
    """(table, key) of every setting in these tables."""
    return [(table, key) for table in tables for key in vars(getattr(config, table))]


def with_settings(config: Config, made: dict, counts: list[tuple[str, str]]) -> dict:
    """The settings `counts`, (table, key) each, of `made`; the rest are those of `config`."""
    settings = dataclasses.asdict(config)
    for table, key in counts:
        if table in made:   # of official weights only the path is known
            settings[table][key] = made[table].get(key)
    return settings


def public_digest(images: np.ndarray, private: np.ndarray | tuple, config: Config) -> str:
    """The digest of the public images; ValueError if the private ones are the same.

    Every public image is read: a damaged one is refused before the first step.
    """
    digest = set_digest(each_digest(tqdm(images, desc="checking public images", delay=2)))
    if len(images) == len(private) and digest == set_digest(each_digest(private)):
        raise ValueError(f"{config.data.private} holds the images of {config.data.public}: what is "
                         "private must not be public")
    return digest


@dataclass
class PrivateRun:
    """A private run: its model, its plan, and what they depend on."""
    model: LatentDiffusion
    plan: PrivacyPlan
    earlier: list[dict]      # ledger of the private runs behind the public model
    public_config: dict      # settings of the public stage
    start: dict | None = None    # what `Saver` kept of an interrupted run
    public_digest: str | None = None   # of the public images; official weights have none
    handle: str = field(default_factory=new_handle)   # by which fingerprint knows the run

    def knows(self, digests: list[bytes], same_name: bool) -> bool:
        """Whether the public model was trained on the images of which `each_digest` is given.

        One set has many names, so their digest tells. A folder may have changed, and of official
        weights no digest is known, so the name tells too.
        """
        return same_name or set_digest(digests) == self.public_digest

    @property
    def public_data(self) -> str:
        return self.public_config["data"]["public"]

    def trained_names(self, config: Config) -> list[str]:
        """Names of the parameters that the private stage trains."""
        return private_parameter_names(self.model, config.context_tokens, config.private.trainable)

    def ledger_after(self, steps: int, config: Config) -> list[dict]:
        """The earlier runs' ledger, and `steps` steps of this one."""
        seed = config.private.insecure_noise_seed
        return [*self.earlier, ledger.ledger_entry(self.plan, steps, seed)]

    def save(self, path: Path, config: Config, classes: list[str], steps: int,
             **details: object) -> None:
        """Write a checkpoint after `steps` steps, with its privacy.json just before it.

        So no checkpoint is without one, nor with another's where the disk is full. details: what
        else it holds, or how save_checkpoint stores it.
        """
        whole = self.ledger_after(steps, config)
        if "training" in details:   # the run can be resumed
            details["training"] = {**details["training"], "handle": self.handle}
        save_checkpoint(
            path, self.model, lambda: ledger.write_privacy_json(path, whole, self.plan.delta),
            classes=classes, config=dataclasses.asdict(config), public_config=self.public_config,
            plan=dataclasses.asdict(self.plan), ledger=whole, public_digest=self.public_digest,
            **details)

    def finish(self, config: Config, files: Files, classes: list[str]) -> None:
        """Write the finished checkpoint: beside a public model, what the run has changed of it.

        Then say what was spent, and delete what was there to resume.
        """
        beside = files.public.is_file() and not config.run.whole
        self.save(files.target, config, classes, self.plan.steps, half=config.run.half,
                  base=base_digests(files.public) if beside else None)
        remove_unfinished(files.unfinished)
        report(self, config, files.target)


def interrupted_run(config: Config, path: Path, num_examples: int,
                    classes: list[str]) -> PrivateRun:
    """The interrupted run in `path`. ValueError if settings or data would change its course."""
    model, metadata = load_checkpoint(path)
    if "training" not in metadata:
        raise ValueError(f"{path} is no interrupted run: it lacks the training state")
    handle = str(metadata["training"].get("handle", ""))
    if can_check(handle):   # then the data may have moved: the digest tells whether they are others
        metadata["config"]["data"]["private"] = config.data.private
    check_same(path, config, of_private_stage(config, metadata), "go on with that (on another "
               "machine put the data, or a link to them, where they were), or give --overwrite to "
               "start anew")
    begun_with = metadata["plan"]["num_examples"], metadata["classes"]
    if begun_with != (num_examples, classes):
        raise ValueError(f"{path} was begun with {begun_with[0]} examples of {begun_with[1]}, not "
                         f"{num_examples} of {classes}: the data have changed")
    run = PrivateRun(model, PrivacyPlan(**metadata["plan"]), metadata["ledger"][:-1],
                     metadata["public_config"], metadata["training"],
                     metadata.get("public_digest"), handle)
    if set(run.trained_names(config)) != set(run.start["parameters"]):
        raise ValueError(f"{path} is damaged: its training state is of other weights")
    print(f"going on with {path} after {run.start['step']} steps")
    return run


def new_run(config: Config, public: Path, num_examples: int, classes: list[str],
            public_model: Callable) -> PrivateRun:
    """A run from the public model, with embeddings for the private classes.

    public_model() -> (model, metadata), called if `public` does not exist yet. ValueError if the
    budget does not allow the run, or if the model is another than the settings ask for.
    """
    if config.run.resume:
        print(f"nothing to resume in {config.folder}: a new run")
    if public.exists() and config.run.pretrained:
        raise ValueError(f"there are two public models, {public} and --pretrained: leave out "
                         "--pretrained or give another --out")
    model, metadata = load_checkpoint(public) if public.exists() else (None, {})
    earlier, private = metadata.get("ledger", []), config.private
    # A budget that cannot be met is refused before the public stage.
    plan = make_plan(num_examples, private.expected_batch, private.epochs, private.max_grad_norm,
                     private.epsilon, private.delta, ledger.ACCOUNTANTS[private.accountant],
                     ledger.segments(earlier))
    if model is None:
        with shapes_only():   # so is a --trainable that the model does not have
            private_parameter_names(build_model(config.architecture(len(classes))),
                                    config.context_tokens, private.trainable)
        model, metadata = public_model()
    public_config = metadata.get("public_config", metadata["config"])
    if not (config.run.public_checkpoint or config.run.pretrained):
        check_public(public, config, public_config)
    wanted = config.architecture(model.architecture["num_classes"])
    if "lora_rank" in model.architecture:   # an earlier private run added it
        wanted["lora_rank"] = model.architecture["lora_rank"]
    if model.architecture != wanted:
        raise ValueError(f"{public} has another architecture than the settings ask for: "
                         "give the settings it was trained with, or another --out")
    starts = match_classes(classes, metadata["classes"])
    model = new_class_embedder(model, starts, len(classes))
    if private.trainable.startswith("lora") and "lora_rank" not in model.architecture:
        add_lora(model.unet, private.lora_rank, config.public.seed)
        model.architecture["lora_rank"] = private.lora_rank
    return PrivateRun(model, plan, earlier, public_config,
                      public_digest=metadata.get("public_digest"))


def make_public(target: Path, run_public: Callable[[], None]) -> None:
    """Run the public stage unless another run has just made `target`; ValueError while one does."""
    with locked(target):
        if not target.exists():
            print(f"there is no public model at {target} yet: running the public stage first")
            run_public()


def announce(run: PrivateRun, config: Config) -> None:
    """Say, before the first step, what the private stage will do and spend.

    ValueError if that is more than the budget.
    """
    plan, model, private = run.plan, run.model, config.private
    epsilon = ledger.check_overspending(run.earlier, plan, private.epsilon, private.accountant)
    trained = num_parameters(map(model.get_parameter, run.trained_names(config)))
    total = num_parameters((*model.unet.parameters(), *model.embedder.parameters()))
    print(f"private stage: N = {plan.num_examples:,}, sample rate {plan.sample_rate:.5f}, "
          f"{plan.steps:,} steps, sigma = {plan.noise_multiplier:.4f}, C = {plan.max_grad_norm:g}\n"
          f"spends epsilon = {in_words(epsilon)} at delta = {plan.delta:g} "
          f"({private.accountant.upper()}); trains {trained:,} of {total:,} parameters "
          f"({trained / total:.1%}) of a model that knows {run.public_data}")
    if run.earlier:
        before = ledger.spent_epsilon(run.earlier, plan.delta, private.accountant)
        print(f"of that epsilon, {in_words(before)} was spent before")
    if plan.delta >= 1 / plan.num_examples:
        print(f"WARNING: delta is not below 1/N = {1 / plan.num_examples:.1e}: it allows to "
              "publish single examples")
    if private.insecure_noise_seed >= 0 or ledger.is_seeded(run.earlier):
        print("WARNING: --insecure-noise-seed: THIS RUN IS NOT PRIVATE. Whoever knows the seed can "
              "subtract the noise.")
    if config.run.show_private_loss:
        print("WARNING: the loss shown below is computed from private data without noise. "
              "Do not publish it.")


def report(run: PrivateRun, config: Config, target: Path) -> None:
    """Say what has been spent, by every accountant that reaches so far."""
    epsilons = ledger.all_epsilons(run.ledger_after(run.plan.steps, config), run.plan.delta)
    spent = ", ".join(f"{in_words(epsilon)} ({name.upper()})"
                      for name, epsilon in epsilons.items())
    print(f"spent epsilon = {spent} at delta = {run.plan.delta:g}: see "
          f"{ledger.privacy_json(target)}")


# ---- between two steps -------------------------------------------------------------------------

class Saver:
    """train_private's on_step: saves every save_every steps, and stops where it was asked to.

    save(training) writes a checkpoint. stop is true once the run was asked to stop.
    """

    def __init__(self, model: LatentDiffusion, total: int, save_every: int, stop: object,
                 save: Callable[[dict], None]):
        self.model, self.total, self.save_every = model, total, save_every
        self.stop, self.save = stop, save

    def __call__(self, step: int, *state: object) -> None:
        stop_now = bool(self.stop)
        if step % self.save_every == 0 or stop_now:
            self.save_state(step, *state)
        if stop_now:
            raise KeyboardInterrupt(f"stopped after {step} of {self.total} steps: the same command "
                                    "with --resume goes on from here")

    def save_state(self, step: int, parameters: Tensors, optimizer: torch.optim.Optimizer,
                   ema: EMA) -> None:
        self.model.load_state_dict(ema.shadow, strict=False)
        self.save(dict(step=step, parameters=parameters, ema=ema.shadow,
                       optimizer=optimizer.state_dict()))


def showing_loss(clipped_sum: Callable, examples: int) -> Callable:
    """clipped_sum, which also prints the mean loss of some examples: NOT PRIVATE."""
    calls = itertools.count()

    def sum_and_show(model: LatentDiffusion, parameters: Tensors, batch: Batch,
                     C: float) -> Tensors:
        if next(calls) % 10 == 0 and len(batch[0]):
            draws = tuple(x[:examples].flatten(0, 1) for x in batch)
            with torch.no_grad():
                loss = functional_call(model, parameters, draws).mean()
            tqdm.write(f"not_private_loss={loss.item():.3f}")
        return clipped_sum(model, parameters, batch, C)

    return sum_and_show


def restore(start: dict | None, parameters: Tensors, optimizer: torch.optim.Optimizer,
            ema: EMA) -> int:
    """Put everything back as `Saver` kept it, in place; the step to go on with."""
    if start is None:
        return 0
    for name, p in parameters.items():
        p.copy_(start["parameters"][name])
        ema.shadow[name].copy_(start["ema"][name])
    groups = optimizer.state_dict()["param_groups"]   # as the settings have it, not the file
    optimizer.load_state_dict({**start["optimizer"], "param_groups": groups})
    ema.step = start["step"]
    return start["step"]


def remove_unfinished(path: Path) -> None:
    """Delete what an interrupted run left, once the finished checkpoint is written."""
    if is_first_process():
        forget(path)
        for leftover in (path, ledger.privacy_json(path)):
            leftover.unlink(missing_ok=True)


def check_finite(model: LatentDiffusion, settings: str) -> None:
    """ValueError if a weight is not finite, or what the networks make of noise: lower `settings`.

    The noise is fixed and public. Two time steps see the null class and one other.
    """
    device = model.alphas_cumprod.device
    z = torch.randn(2, *model.vae.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, len(model.alphas_cumprod) - 1], device=device)
    condition = model.embedder.conditions(["a", "b"]).to(device)
    condition[0] = model.embedder.null_class
    with torch.no_grad():
        eps_hat = model.unet(z.to(device), t, model.embedder(condition))
        images = model.vae.decode(z.to(device) / model.latent_scale)
    numbers = (*model.state_dict().values(), eps_hat, images)
    if not all(x.isfinite().all() for x in numbers):
        raise ValueError(f"training has diverged, nothing is saved: give a lower {settings}")
