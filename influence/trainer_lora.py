"""transformers' Trainer, with this package's batches, losses and weights in it.

Its documented places for that are overridden: the data loader, the training step, the schedule,
the evaluation and the log. Optimiser, clipping, data parallelism, checkpoints and going on from
one are the Trainer's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from influence.batching import make_batches
from influence.errors import TrainingError
from influence.finetune_settings import FinetuneSettings
from influence.finetune_steps import Steps, rate_factor, share_of
from influence.held_out import row_losses, set_loss
from influence.loss import response_forward, sample_losses
from influence.tokenization import Encoded
from influence.training_data import TrainingRows
from influence.training_progress import Watcher
from influence.training_record import SetRecord

#: More steps than these share an entry of the log.
LOG_ENTRIES = 5000
_EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class Work:
    """What is trained on and evaluated, and who is told.

    `saved` is called with the step, the local folder and the log of every checkpoint, by the first
    worker alone.
    """

    rows: TrainingRows
    sets: Mapping[str, Sequence[Encoded]]
    settings: FinetuneSettings
    steps: Steps
    watcher: Watcher
    saved: Callable[[int, str, list[dict[str, Any]]], None]


class _StepData(Dataset):
    """Step -> the rows of it that this worker takes, each with its share of the step's loss."""

    def __init__(self, work: Work, worker: int, workers: int) -> None:
        self._work, self._worker, self._workers = work, worker, workers

    def __len__(self) -> int:
        return self._work.steps.total

    def __getitem__(self, step: int) -> dict[str, Any]:
        chosen = self._work.steps.rows_of(step)
        encoded = [self._work.rows.encoded[i] for i in chosen]
        # The gradients of the workers are averaged, so each one's share counts as many times.
        shares = self._work.rows.weights[chosen] * (self._workers / len(chosen))
        mine = share_of([row.n_tokens for row in encoded], self._worker, self._workers)
        if not mine:
            # The last step of an epoch may have fewer rows than workers, but all have to take part.
            mine, shares = [0], shares * 0.0
        return {
            "rows": [encoded[i] for i in mine],
            "shares": torch.as_tensor(shares[mine]),
            "tokens": sum(row.n_tokens for row in encoded),
        }


class LoraTrainer(Trainer):
    """Minimises (1/b) sum w_i l_i over the b rows of every step, l_i a row's response loss.

    The rows of a step go through the model in micro-batches of rows of similar length, of
    `token_budget` tokens at most: how they are cut, padded and dealt out to workers changes no
    more than the rounding. Dropout is seeded by step and worker, so that a step is the same
    whatever happened before it.
    """

    def __init__(self, model: Any, work: Work, folder: str, *, begins: bool) -> None:
        settings, device = work.settings, next(model.parameters()).device
        arguments = TrainingArguments(
            folder,
            max_steps=work.steps.total,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            optim="adamw_torch",
            seed=settings.seed,
            logging_steps=-(-work.steps.total // LOG_ENTRIES),
            logging_nan_inf_filter=False,
            eval_on_start=begins and bool(work.sets),
            save_strategy="no",
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=False,
            ddp_broadcast_buffers=False,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # one device a worker, never nn.DataParallel
        super().__init__(
            model, arguments, train_dataset=_StepData(work, *_place(arguments)), callbacks=[]
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(self))
        self.work = work
        self._tokens, self._seconds = 0, 0.0

    def get_train_dataloader(self) -> DataLoader:
        """One item is one step of this worker; accelerate is not to deal out anything itself."""
        data: Any = self.train_dataset
        return DataLoader(data, batch_size=1, shuffle=False, collate_fn=_only)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """AdamW's rate by `rate_factor`."""
        settings = self.work.settings

        def factor(step: int) -> float:
            if step >= num_training_steps:
                return 0.0
            return rate_factor(step, num_training_steps, settings.warmup_ratio, settings.schedule)

        if self.lr_scheduler is None:
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward over the micro-batches of one step; returns its weighted loss."""
        model.train()
        worker, _ = _place(self.args)
        torch.manual_seed(_noise_seed(self.args.seed, self.state.global_step, worker))
        batches = make_batches(inputs["rows"], self.work.settings.token_budget)
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches):
            # The workers' gradients meet in the last backward pass of the step.
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses = self._losses(model, batch)
                loss = (losses * inputs["shares"][batch.positions].to(losses)).sum()
                self.accelerator.backward(loss)
            total += loss.detach()
        self._tokens += inputs["tokens"]
        return total

    def _losses(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        bare: Any = self.model
        logits, labels, sample_index = response_forward(bare, batch, call=model)
        return sample_losses(
            logits, labels, sample_index, len(batch.positions), self.work.settings.reduction
        )

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Adds tokens and seconds to the entries of steps, and tells the watcher."""
        if "loss" in logs:
            logs = {**logs, "tokens": self._tokens, "seconds": self._seconds}
            self._tokens, self._seconds = 0, 0.0
        super().log(logs, start_time)
        # To the Trainer all steps are one epoch.
        entry = self.state.log_history[-1]
        entry["epoch"] = self.state.global_step / self.work.steps.per_epoch
        if "loss" in logs:
            if not torch.isfinite(torch.tensor(logs["loss"])):
                raise _not_finite(self.state.global_step, logs["loss"])
            if self.is_world_process_zero():
                done, tokens = self.state.global_step, logs["tokens"]
                self.work.watcher.step(done, logs["loss"], tokens, logs["seconds"])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The losses of the named sets, whose rows are dealt out to the workers."""
        bare: Any = self.model
        bare.eval()
        worker, workers = _place(self.args)
        found = {}
        for name, rows in self.work.sets.items():
            mine = share_of([row.n_tokens for row in rows], worker, workers)
            pairs = []
            for first in range(0, len(mine), _EVALUATED_AT_ONCE):
                some = mine[first : first + _EVALUATED_AT_ONCE]
                part = [rows[i] for i in some]
                losses = row_losses(bare, part, self.work.settings.token_budget)
                pairs += zip(some, losses, strict=True)
                if worker == 0:
                    done = min(len(rows), len(pairs) * workers)
                    self.work.watcher.evaluating(name, done, len(rows))
            losses = dict(pairs if workers == 1 else gather_object(pairs))
            figures = set_loss(rows, [losses[i] for i in range(len(rows))])
            found[name] = SetRecord.of(figures).model_dump()
        self.log({"evaluation": found})
        if worker == 0:
            self.work.watcher.note(evaluation_line(self.state.global_step, found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}

    def took(self, seconds: float) -> None:
        """A step took so long."""
        self._seconds += seconds


class _Flow(TrainerCallback):
    """When to evaluate and to save; how long steps take without that."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self._trainer = trainer
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._trainer.took(time.monotonic() - self._start)
        work, done = self._trainer.work, state.global_step
        last = done >= work.steps.total
        if work.sets and work.steps.due(done, work.settings.evaluate_every):
            control.should_evaluate = True
        ends = work.settings.keep_epochs and done in work.steps.ends
        if ends or work.steps.due(done, work.settings.save_every):
            control.should_save = True
        control.should_log |= last or control.should_save or control.should_evaluate
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = f"{args.output_dir}/checkpoint-{state.global_step}"
            self._trainer.work.saved(state.global_step, folder, state.log_history)


def evaluation_line(step: int, sets: Mapping[str, Mapping[str, Any]]) -> str:
    """step 40: gsm8k loss 1.2345, perplexity 3.21; ..."""
    parts = [
        f"{name} loss {_shown(each['loss'])}, perplexity {_shown(each['perplexity'])}"
        for name, each in sets.items()
    ]
    return f"step {step}: {'; '.join(parts)}"


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _place(arguments: TrainingArguments) -> tuple[int, int]:
    """(this worker's number, workers)."""
    return arguments.process_index, arguments.world_size


def _only(items: list[Any]) -> Any:
    return items[0]


def _noise_seed(seed: int, step: int, worker: int) -> int:
    """Of dropout; other numbers than LoRA's initialisation draws."""
    return ((seed * 1_000_003 + step) * 1_009 + worker + 0xD60) % 2**63


def _not_finite(step: int, loss: float) -> TrainingError:
    return TrainingError(
        f"finetune: the loss of step {step} is {loss}; a lower finetune.learning_rate, a smaller "
        "finetune.max_grad_norm or a float32 base may help"
    )
