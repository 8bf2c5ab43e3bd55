"""Stage 7: training. Text files in, a model folder out, resumable at any step.

All randomness is a function of (seed, epoch, step), so a resumed run repeats the uninterrupted
one. Every process of `accelerate launch` takes its share of each batch; since all know the
whole batch, the loss is the single-process one.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from fusion_model import progress
from fusion_model.config import FusionLMConfig
from fusion_model.data.batches import Batch, Batches
from fusion_model.devices import resolve_dtype
from fusion_model.errors import CheckpointError, FusionLMError
from fusion_model.files import locked, replace_files, write_text
from fusion_model.hashes import HASHES, write_hashes
from fusion_model.language_model import to_tensors
from fusion_model.model import FusionLMForCausalLM
from fusion_model.schema import Size, read_lines
from fusion_model.training.checkpoint import load_checkpoint, save_checkpoint
from fusion_model.training.claim import check_machine, claim_finished, claim_folder, is_finished
from fusion_model.training.data import TrainingData, prefix_scale, prepare
from fusion_model.training.model_card import plot_metrics, write_model_card
from fusion_model.training.options import TrainingOptions

SECONDS_PER_CHECKPOINT = 120
SECONDS_PER_LOOK = 1  # at the loss: a GPU is waited for


class Epoch(TypedDict):
    """What is read again of a line of `metrics.jsonl`."""

    epoch: Size
    dev_loss: float
    dev_perplexity: float


class _SummedLoss(nn.Module):
    """Negative log-likelihood of a batch in nats, summed: what accelerate wraps."""

    def __init__(self, model: FusionLMForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor | None) -> Tensor:
        return -self.model.token_log_probs(*batch).sum()  # type: ignore[arg-type]


class _StopRequest:
    """Ctrl-C or SIGTERM: the step in hand is finished and saved before the run ends."""

    def __init__(self) -> None:
        self.requested = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._request)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if self.requested:  # asked twice: at once
            raise KeyboardInterrupt
        self.requested = True

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt


def train(
    options: TrainingOptions,
    out: Path,
    store: Path | None = None,
    build: Callable[[FusionLMConfig], FusionLMForCausalLM] = FusionLMForCausalLM,
) -> dict[str, Any]:
    """Train and write the best model on dev to `out`; returns its metrics.

    Run again with the same options, it goes on where it was stopped.

    Args:
        options: the run.
        out: folder for model, tokenizer, `metrics.jsonl`, `training.png` and the model card.
        store: folder for the prefix embeddings (default: `out/prefixes`); may be shared.
        build: makes the model; a subclass may train it otherwise.

    Raises:
        FusionLMError: bad input; `out` holds another run; a damaged checkpoint or store.
    """
    # Precision is set below, by autocast: accelerate would fix it for the whole process.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    check_machine(options, accelerator.device)
    main = accelerator.is_main_process
    with ExitStack() as held:
        if main:
            try:
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(out / ".lock", str(out)))
            except OSError as error:
                raise CheckpointError(f"cannot write to {out}: {error.strerror}") from error
        claim_folder(options, out, main)
        accelerator.wait_for_everyone()
        data = prepare(options, out, store or out / "prefixes", accelerator)
        run = TrainingRun(options, out, data, accelerator, build)
        try:
            return run.fit()
        finally:
            accelerator.end_training()


class TrainingRun:
    """A run in progress: model, optimiser, and where it is."""

    def __init__(
        self,
        options: TrainingOptions,
        out: Path,
        prepared: TrainingData,
        accelerator: Accelerator,
        build: Callable[[FusionLMConfig], FusionLMForCausalLM] = FusionLMForCausalLM,
    ) -> None:
        self.options, self.out, self.accelerator = options, out, accelerator
        self.prepared, self.data, self.dev = prepared, prepared.train, prepared.dev
        torch.manual_seed(options.seed)
        self.model = build(model_config(options, prepared))
        if self.model.prefix_scale is not None:
            parts = self.model.config.pooling.count("+") + 1
            self.model.prefix_scale.copy_(prefix_scale(prepared.train, parts, options.prefix_rms))
        self.model.to(accelerator.device)
        self.model.set_backend(options.backend)
        self.optimizer: Any = torch.optim.Adam(
            self.model.parameters(), lr=options.learning_rate, fused=True
        )
        self.stop = _StopRequest()
        self.state = load_checkpoint(out, self.model, self.optimizer)
        self.state.finished |= not self.state.step and is_finished(out)  # no checkpoint is left
        self.loss: Any
        self.loss, self.optimizer = accelerator.prepare(_SummedLoss(self.model), self.optimizer)
        self.steps_per_epoch = len(self.plan(0))

    def fit(self) -> dict[str, Any]:
        """Train to the end; metrics of the best epoch."""
        total = self.steps_per_epoch * self.options.epochs
        with self.stop, progress.track("training", total, start=self.state.step) as update:
            while not self.state.finished:
                self._run_epoch(update, total)
                self._end_epoch()
                self.stop.check()
        metrics = read_lines(self.out / "metrics.jsonl", Epoch)
        if not metrics:
            raise CheckpointError(f"{self.out} has lost its metrics.jsonl: delete it to train anew")
        best = min(metrics, key=lambda m: float(m["dev_loss"]))
        if self.accelerator.is_main_process:
            claim_finished(self.out)
            plot_metrics(metrics, self.out / "training.png")
            write_model_card(self.out, self.options, self.prepared, best)
        return best

    def _check_finite(self, loss: float, what: str) -> None:
        if math.isfinite(loss):
            return
        best = self.out / "model.safetensors"
        kept = "the best model so far is kept" if best.exists() else "no model was made"
        raise FusionLMError(
            f"training went wrong: the {what} is {loss} in epoch {self.state.epoch + 1}, step "
            f"{self.state.step + 1}; {kept}; try a lower --learning-rate than "
            f"{self.options.learning_rate:g}, with another --out"
        )

    def plan(self, epoch: int) -> list[Any]:
        """Sentence indices of each batch of an epoch."""
        seed = self.options.seed * 10_007 + epoch
        return self.data.plan(
            self.options.tokens_per_batch, seed, least=self.accelerator.num_processes
        )

    def _run_epoch(self, update: progress.Update, total: int) -> None:
        state, options = self.state, self.options
        self.model.config.prefix_dropout = options.prefix_dropout_at(state.epoch)
        self.model.train()
        plan = self.plan(state.epoch)
        saved_at = started = time.monotonic()
        loss_sum = torch.tensor(state.loss_sum, dtype=torch.float64, device=self.accelerator.device)
        shown, shown_at = "", -math.inf
        for indices in plan[state.batch :]:
            loss, tokens = self.step(indices, total)
            loss_sum += loss
            state.tokens += tokens
            state.batch += 1
            state.step += 1
            now = time.monotonic()
            if now - shown_at > SECONDS_PER_LOOK:
                self._check_finite(float(loss_sum), "loss")
                shown_at, shown = now, f"epoch {state.epoch + 1}, loss {float(loss) / tokens:.3f}"
            update(min(state.step, total), shown)
            due = self.stop.requested or now - saved_at > SECONDS_PER_CHECKPOINT
            if due and state.batch < len(plan):
                state.seconds, started = state.seconds + now - started, now
                state.loss_sum = float(loss_sum)
                self._check_finite(state.loss_sum, "loss")
                self._save()
                saved_at = now
                self.stop.check()
        state.loss_sum = float(loss_sum)
        self._check_finite(state.loss_sum, "loss")
        state.seconds += time.monotonic() - started

    def step(self, indices: Any, total: int) -> tuple[Tensor, int]:
        """One optimiser step on these sentences; their summed loss in nats, and their tokens.

        Nothing here waits for a GPU.
        """
        accelerator, options = self.accelerator, self.options
        world, rank = accelerator.num_processes, accelerator.process_index
        torch.manual_seed((options.seed << 40) + self.state.step * world + rank)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * _lr_scale(self.state.step, total, options.warmup)
        tokens = int((self.data.lengths[indices] - 1).sum())
        share = indices[rank::world]
        idle = len(share) == 0  # fewer sentences than processes: take part with weight 0
        batch = self.data.batch(indices[:1] if idle else share)
        with autocast(options.precision, accelerator.device):
            loss = self.loss(*_inputs(batch, accelerator.device))
        # DDP averages gradients over processes: times world, over the whole batch's tokens.
        accelerator.backward(loss * (0.0 if idle else world / tokens))
        accelerator.clip_grad_norm_(self.loss.parameters(), options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return accelerator.reduce(loss.detach() * (not idle), "sum"), tokens

    def _end_epoch(self) -> None:
        state, options = self.state, self.options
        dev = evaluate_loss(self.model, self.dev, self.accelerator, options.precision)
        self._check_finite(dev, "dev loss")
        metrics = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "train_loss": state.loss_sum / state.tokens,
            "dev_loss": dev,
            "dev_perplexity": math.exp(min(dev, 700)),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "prefix_dropout": self.model.config.prefix_dropout,
            "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
            "seconds": state.seconds,
            "processes": self.accelerator.num_processes,
        }
        better = dev < state.best_dev
        state.bad_epochs = 0 if better else state.bad_epochs + 1
        state.best_dev = min(dev, state.best_dev)
        state.epoch, state.batch = state.epoch + 1, 0
        state.loss_sum, state.tokens, state.seconds = 0.0, 0, 0.0
        stopped = options.patience > 0 and state.bad_epochs >= options.patience
        state.finished = stopped or state.epoch >= options.epochs
        if self.accelerator.is_main_process:
            progress.note(
                f"epoch {metrics['epoch']:>3}  train loss {metrics['train_loss']:.4f}  dev loss "
                f"{dev:.4f}  dev perplexity {metrics['dev_perplexity']:.2f}"
                f"{'  (best)' if better else ''}"
            )
            _write_metrics(self.out, metrics)
            if better:
                self._save_model()
        self._save()

    def _save_model(self) -> None:
        self.model.config.prefix_dropout = self.options.prefix_dropout
        try:
            (self.out / HASHES).unlink(missing_ok=True)  # those of the model before
            with replace_files(self.out) as folder:
                self.model.save_pretrained(folder)
            write_hashes(self.out)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write the model to {self.out}: {error}; run the same command to go on"
            ) from error

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(self.out, self.model, self.optimizer.optimizer, self.state)
        self.accelerator.wait_for_everyone()


def model_config(options: TrainingOptions, data: TrainingData) -> FusionLMConfig:
    """The model that these options describe, once tokenizer and encoder are known."""
    tokenizer, encoder = data.tokenizer, data.encoder
    names = ["fusion", "embedding_size", "hidden_size", "num_layers", "tie_weights"]
    names += ["dropout", "prefix_dropout"]
    fields: dict[str, Any] = {}
    if encoder is not None:
        names += ["view", "shuffle"]
        own = options.fusion in ("concat", "input") or encoder.dim != options.hidden_size
        fields = {
            "scale_prefix": options.prefix_rms > 0 and own,  # e has weights that can make up for it
            "prefix_size": encoder.dim,
            "encoder": encoder.name,
            "encoder_sha256": encoder.content_sha256,
            "pooling": encoder.pooling,
            "policy": encoder.policy,
        }
    return FusionLMConfig(
        vocab_size=len(tokenizer),
        shares_vocabulary=options.vocabulary == "encoder",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{name: getattr(options, name) for name in names},
        **fields,
    )


def _inputs(batch: Batch, device: torch.device) -> list[Any]:
    """Ids and vectors on the device; lengths stay, as they decide on shapes."""
    return [*to_tensors(batch[:2], device), torch.from_numpy(batch.lengths)]


@torch.inference_mode()
def evaluate_loss(
    model: FusionLMForCausalLM, data: Batches, accelerator: Accelerator, precision: str
) -> float:
    """Mean negative log-likelihood in nats a token, over all processes."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for i, indices in enumerate(data.plan(8192)):
        if i % accelerator.num_processes != accelerator.process_index:
            continue
        batch = _inputs(data.batch(indices), accelerator.device)
        with autocast(precision, accelerator.device):
            log_probs = model.token_log_probs(*batch)
        total += torch.tensor([-log_probs.double().sum(), len(log_probs)])
    loss, tokens = accelerator.reduce(total.to(accelerator.device), "sum").tolist()
    return float(loss / tokens)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision for `bfloat16`, nothing for `float32`; `auto` as in `resolve_dtype`."""
    enabled = resolve_dtype(precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _lr_scale(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over a share of the run, then a cosine down to a tenth."""
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    share = min((step - ramp) / max(1, total - ramp), 1.0)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def _write_metrics(out: Path, metrics: dict[str, Any]) -> None:
    """Append an epoch, once: a run killed between here and its checkpoint repeats the epoch."""
    path = out / "metrics.jsonl"
    kept = [m for m in read_lines(path, Epoch) if m["epoch"] < metrics["epoch"]]
    write_text(path, "".join(json.dumps(m) + "\n" for m in [*kept, metrics]))
