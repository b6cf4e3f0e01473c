"""The training loop of one worker: order the parts, count, log, evaluate, save. It knows no method, coding or model.

Randomness is a pure function of (seed, step, worker or sample position): nothing random has a state to be saved, and
`N steps` equals `k steps, kill, resume, N - k steps`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecocseg import batching, checkpoint, collapse, damage, finite, memory, streams
from ecocseg.asking import Asking
from ecocseg.config import RunConfig
from ecocseg.data.classes import IGNORE
from ecocseg.data.pipeline import Batch, Stream, damage_error
from ecocseg.data.shards import iter_rows
from ecocseg.engine import World, build_engine, schedule
from ecocseg.errors import InputError, Restart
from ecocseg.evaluate import Normalize, evaluate, samples_of_rows
from ecocseg.methods import METHODS, StepInput
from ecocseg.methods.base import random_generator
from ecocseg.metrics import EvalResult
from ecocseg.models.segmenter import parameter_groups
from ecocseg.panels import training_picture
from ecocseg.profile import DATA, EMA, OPTIMIZER, STEP, StepProfile, within
from ecocseg.rank_times import RankTimes, slowest
from ecocseg.saving import Saver
from ecocseg.storage import is_remote, join, needing_room
from ecocseg.teacher import Teacher
from ecocseg.tracking import Tracker, read_metrics, score_table
from ecocseg.volumes import volume_names

Report = Callable[[dict[str, Any]], str | bool]
"""Sends a message to whoever watches the run; what the run is asked is the answer (true = stop)."""
Notice = Callable[[], str]
"""Called by all workers at every log interval; what the run is asked for reasons of its machines, the same for all of them."""


TrackerFactory = Callable[[int, Callable[[dict[str, Any]], None]], Tracker]
"""Makes a tracker that goes on after a step and hands its records to a function."""


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


def run_worker(config: RunConfig, run_url: str, world: World, report: Report,
               tracker: TrackerFactory | None = None, notice: Notice | None = None) -> dict[str, Any]:
    """Train from the newest checkpoint of the run, if it has one, to the last step; returns the final results.

    Raises:
        InputError: when data, codebook or checkpoint do not fit together.
        FloatingPointError: when the loss is no longer finite, or what would be saved is not.
        StorageUnavailable: when a bucket is away, in this step or while an earlier one's checkpoint was written.
    """
    session = Session(config, run_url, world, report, notice)
    try:
        session.start(tracker)
        return session.train()
    except Exception as error:
        error.step = session.step  # type: ignore[attr-defined]  # tells one failure from another
        raise
    finally:
        session.close()


class Session:
    """One worker's share of a run: everything the loop orders, built from the configuration."""

    def __init__(self, config: RunConfig, run_url: str, world: World, report: Report, notice: Notice | None = None) -> None:
        self.config, self.run_url, self.world, self.report, self.notice = config, run_url, world, report, notice
        self.storage = checkpoint.build_storage(config)
        self.checkpoints = checkpoint.Checkpoints(run_url, self.storage)
        self.saver = Saver(self.checkpoints, config.train.keep_checkpoints, config.train.async_checkpoints, self._mirror)
        self.saving_times: dict[str, float] = {}
        self.streams: dict[str, Stream] = {}
        self.tracker: Tracker | None = None
        self.best: dict[str, Any] = {"score": -1.0, "step": -1}
        self.step = 0
        self.asking = Asking(world, lambda: report({"kind": "poll"}))
        self.history: deque[dict[str, Tensor]] = deque()
        self.skipped: list[Tensor] = []
        self.skip_count = finite.SkipCount(config.train.max_skipped)
        self.rank_times = RankTimes(world.device)
        self.damage_counts: dict[str, float] = {}
        self.damage_lists: dict[str, damage.DamageList] = {}
        torch.manual_seed(config.train.seed)
        try:
            self._open_streams()
            self._build()
        except BaseException:
            self.close()
            raise

    def _open_streams(self) -> None:
        """Find the newest whole checkpoint, if there is one, and begin to read what follows it while the model is built."""
        config = self.config
        self.manifests = streams.load_manifests(config)
        self.micro_batches = batching.micro_batches(config, self.world.size)
        self.found = self.checkpoints.newest()
        if self.found is not None:
            self.step = self.found[0].step
        for name in config.streams:
            manifest = self.manifests["labeled" if name == "labeled" else "unlabeled"]
            stream = streams.open_stream(config, name, manifest, self.world, self.step, self.micro_batches)
            known = damage.DamageList(self.storage, join(self.run_url, f"damaged-{name}.tsv"), manifest)
            if self.world.rank == 0:  # what was met before a restart counts on
                stream.damaged.update(known.read())
            stream.warn, stream.on_limit = self._say, partial(known.add, stream.damaged)
            self.streams[name], self.damage_lists[name] = stream.start(), known

    def _build(self) -> None:
        config, world = self.config, self.world
        self.classes = self.manifests["labeled"].classes
        self.book = checkpoint.build_codebook(config.coding, self.classes)
        streams.check_codebooks(config, self.manifests, self.book)
        self.coding = checkpoint.build_coding(config.coding, self.book, self.classes.num_classes)
        self.normalize = Normalize(config.data.mean, config.data.std)
        self.spec = checkpoint.build_spec(config)
        self.volumes = {name: volume_names(self.manifests[f"eval/{name}"], self.storage) if config.eval.metric == "dice" else []
                        for name in config.data.eval}
        segmenter = checkpoint.build_model(config.model, self.coding.num_outputs, storage=self.storage).to(world.device)
        if config.engine.channels_last:  # convolutions keep their input's order; DeepSpeed wants weights in plain order
            segmenter.memory_format = torch.channels_last
        model: nn.Module = segmenter
        if config.engine.sync_batch_norm and world.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model: Any = model
        self.memory = memory.check(config, model, world, self.micro_batches)
        pretrained = None
        if config.method.feature_distance > 0:
            frozen = checkpoint.build_model(config.model, self.coding.num_outputs, storage=self.storage)
            frozen.to(world.device).eval().requires_grad_(False)
            pretrained = lambda image: frozen.encode(image)[-1]  # noqa: E731
        kind = METHODS[config.method.kind]
        self.method = kind(config.method, self.coding, self.normalize, pretrained)
        self.teacher = Teacher(model, config.method.ema_decay, kind.whole_teacher) if kind.needs_teacher else None
        self.watch = collapse.CollapseWatch(
            dict(zip(self.classes.names, self.manifests["labeled"].class_pixels, strict=True)),
            patience=config.tracking.collapse_after, steps=config.train.steps,
            images_per_record=config.train.log_every * config.train.unlabeled_batch)
        optim = config.optim
        groups = parameter_groups(self.model, optim.lr * config.lr_factor, optim.decoder_lr_factor, optim.weight_decay,
                                  optim.no_decay)
        if config.engine.compile:
            model.compile()
            if self.teacher is not None:
                self.teacher.module.compile()
        skip = config.train.on_nan == "skip"
        self.buffers = finite.Buffers(model, None if self.teacher is None else self.teacher.module) if skip else None
        self.engine = build_engine(model, groups, optim, config.engine, world,
                                   config.train.labeled_batch // (world.size * self.micro_batches), skip)

    def start(self, tracker: TrackerFactory | None) -> None:
        """Go on from the checkpoint that was found, or say that training begins."""
        if self.found is not None:
            self._restore(*self.found)
            self.found = None  # as large as the model
        elif self.world.rank == 0:
            self._say(f"training from step 0: {self.model_line()}; {self.batch_line()}")
        if self.world.rank == 0 and tracker is not None:
            self.tracker = tracker(self.step + 1, self._progress)
            for record in read_metrics(self.tracker.directory):  # a resumed run watches on from what it saw
                self.watch.update(record["step"], record)

    def _restore(self, snapshot: checkpoint.Snapshot, passed_over: list[str]) -> None:
        where = f"checkpoint of step {snapshot.step}"
        checkpoint.check_same_task(snapshot.meta, self.book, self.classes, where)
        if snapshot.meta["config"]["model"] != self.config.model_dump(mode="json")["model"]:
            raise InputError(f"{where} holds another model; keep model.* as it was, or start a new run")
        self.model.load_state_dict(snapshot.student)
        self.engine.load_optimizer_state(snapshot.optimizer)
        if self.teacher is not None and snapshot.teacher is not None:
            self.teacher.module.load_state_dict(snapshot.teacher)
            self.teacher.updates = snapshot.meta["teacher_updates"]
        self.best = snapshot.meta["best"]
        self.saver.newest = self.step
        if self.world.rank == 0:
            for message in passed_over:
                self._say(f"passed over: {message}")
            self._say(f"going on from step {self.step} on {self.world.size} worker(s)")

    def train(self) -> dict[str, Any]:
        config = self.config.train
        results: dict[str, dict[str, EvalResult]] = {}
        batches = {name: iter(stream) for name, stream in self.streams.items()}
        clock = Clock(self.streams)
        if config.log_every > 1:
            self.asking.start()
        profile = StepProfile(config.profile if self.world.rank == 0 else 0, self.world.device, self.run_url, self.storage)
        while self.step < config.steps:
            self._note_saved()
            if message := profile.step():
                self._say(message)
            with within(STEP):
                self._train_step(batches)
            self.step += 1
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last:
                asked = self._log(clock)
            else:
                asked = self.asking.between()
            evaluated = last or (config.eval_every > 0 and self.step % config.eval_every == 0)
            if evaluated and self.config.data.eval:
                results = self._evaluate()
                clock.skip()
            best = evaluated and self._score(results) > self.best["score"]
            if last or asked or best or (config.checkpoint_every > 0 and self.step % config.checkpoint_every == 0):
                self._save(results if evaluated else {})
                if last or asked in ("restart", "stop"):
                    self._note_saved(wait=True)
                clock.skip()
            if asked in ("restart", "stop") and not last:
                self.world.sum(torch.zeros(1, device=self.world.device))  # no worker leaves before all have saved
                self._end_tracking()
                if asked == "restart":
                    raise Restart(f"saved at step {self.step}")
                raise Stopped(f"stopped at step {self.step}; saved, go on with --resume")
        if message := profile.finish():
            self._say(message)
        if not results and self.config.data.eval:  # resumed after its last step, which is in the records already
            results = self._evaluate(record=False)
        return self._final(results)

    def _train_step(self, batches: dict[str, Iterator[list[Batch]]]) -> None:
        """One optimiser step over this worker's slice of the global batch."""
        step, seed = self.step, self.config.train.seed
        torch.manual_seed(random_generator(seed, step, self.world.rank, 7).initial_seed())  # dropout, stochastic depth
        if self.teacher is not None and step > 0 and not self.teacher.whole:
            with within(EMA):
                self.teacher.update(self.model)
        if self.buffers is not None:
            self.buffers.keep()
        asked = time.perf_counter()
        with within(DATA):
            taken = {name: [batch.to(self.world.device) for batch in next(stream)] for name, stream in batches.items()}
        self.rank_times.add(time.perf_counter() - asked)
        steps = [StepInput(step, seed, one, taken["unlabeled"][number] if "unlabeled" in taken else None, self.engine,
                           self.teacher, self.engine.autocast, model=self.model,
                           partner=taken["partner"][number] if "partner" in taken else None,
                           unlabeled_total=self.config.train.unlabeled_batch)
                 for number, one in enumerate(taken["labeled"])]
        self._sum_counts(steps)
        self.engine.set_lr(schedule(self.config.optim, self.config.train.steps, step))
        draw = self.config.train.panels_every > 0 and (step + 1) % self.config.train.panels_every == 0
        if draw and self.world.rank == 0:
            steps[0].pictures = {}
        self.rank_times.begin()
        for number, given in enumerate(steps):
            self.model.begin_step(random_generator(seed, step, 8))  # for all workers and micro-batches the same
            parts = self.method.parts(given)
            for index, part in enumerate(parts):
                last = number == len(steps) - 1 and index == len(parts) - 1
                self.engine.run_part(self.rank_times.ending(part) if last else part, 1 / len(steps), last)
            self.history.append(given.metrics)
            if given.pictures and self.tracker is not None:
                with needing_room(str(self.tracker.directory)):
                    self.tracker.image(step + 1, "training", training_picture(given.pictures, self.coding, self.classes))
        with within(OPTIMIZER):
            norm = self.engine.step()
        if self.engine.skipped is not None:
            self.skipped.append(self.engine.skipped)
            if self.buffers is not None:
                self.buffers.put_back(self.engine.skipped)
        if self.teacher is not None and self.teacher.whole:  # the last student is in what is evaluated and saved
            with within(EMA):
                self.teacher.update(self.model)
        self.history[-1]["gradient_norm"] = _scalar(norm, self.world.device)

    def _sum_counts(self, steps: list[StepInput]) -> None:
        """What a step must know of the whole global batch, by one sum over workers, so that neither their number nor that of
        micro-batches changes it: valid pixels over the number of averaged losses, and classes to mix."""
        counts, classes = [], []
        for given in steps:
            assert given.labeled.labels is not None
            unlabeled, present = self.method.unlabeled_pixels(given), self.method.classes_present(given)
            labeled = (given.labeled.labels != IGNORE).sum().reshape(1)
            counts.append(labeled if unlabeled is None else torch.cat([labeled, unlabeled]))
            classes.append(labeled[:0] if present is None else present)
        divided, number = self.config.method.average != "all", len(counts[0])
        if not divided and number == 1 and len(classes[0]) == 0:
            return
        total = self.world.sum(torch.cat([torch.stack(counts).sum(0), torch.stack(classes).sum(0)]).double())
        divisors = (total[:number].clamp_min(1) / (self.world.size * len(steps))).float()
        for given in steps:
            given.divisor = divisors[0] if divided else None
            given.unlabeled_divisors = divisors[1:] if number > 1 else None
            given.mix_classes = total[number:] > 0 if len(classes[0]) > 0 else None

    def _log(self, clock: Clock) -> str:
        """Reduce the metrics of the interval over workers; the only host sync of the interval. Returns what is asked."""
        skip, names = self.config.train.on_nan == "skip", sorted({name for metrics in self.history for name in metrics})
        totals = [finite.total(torch.stack([m[name].float() for m in self.history if name in m]), skip) for name in names]
        own = torch.zeros(self.world.size, device=self.world.device)
        own[self.world.rank] = self.rank_times.take()
        sums = self.world.sum(torch.cat([*totals, own])).tolist()  # .tolist() is the sync point
        scalars = {name: sums[2 * i] / sums[2 * i + 1] if sums[2 * i + 1] else math.nan for i, name in enumerate(names)}
        scalars |= slowest(sums[2 * len(names):]) if self.world.size > 1 else {}
        self._check_finite(scalars)
        self.history.clear()
        self._note_damage()
        scalars.update(clock.read(self.step), **self.saving_times, lr=self.config.optim.lr * self.config.lr_factor * schedule(
            self.config.optim, self.config.train.steps, self.step - 1))
        self.saving_times.clear()
        scalars = collapse.named(scalars, self.classes.names)
        collapsed, warnings = self.watch.update(self.step, scalars)
        if self.world.rank == 0:
            self._record(scalars | collapsed)
        for warning in warnings if self.world.rank == 0 else ():
            self._say(warning)
        return self.asking.now("" if self.notice is None else self.notice())

    def _check_finite(self, scalars: dict[str, float]) -> None:
        """Count the steps of the interval that were left out, or end the run as `train.on_nan` says."""
        left_out = torch.stack(self.skipped).tolist() if self.skipped else []
        self.skipped.clear()
        loss = sum(value for name, value in scalars.items() if name.startswith("loss/"))
        if self.config.train.on_nan == "skip":
            count = self.skip_count.update(left_out, self.step, self._newest_saved)
            scalars["skipped_steps"] = float(count)
            if count and self.world.rank == 0:
                self._say(f"{count} of {len(left_out)} steps up to step {self.step} left out: their gradient was not finite")
            if count:
                return
        if math.isfinite(loss) and not any(left_out):
            return
        each = torch.stack([torch.stack([value.float() for name, value in metrics.items() if name.startswith("loss/")]).sum()
                            for metrics in self.history])
        since = self.step - len(each) // self.micro_batches + 1
        bad = since + finite.first_bad(self.world.sum(each)) // self.micro_batches if not math.isfinite(loss) else (
            since + left_out.index(1))
        raise FloatingPointError(f"the {'gradient' if math.isfinite(loss) else 'loss'} was not finite at step {bad} (of steps "
                                 f"{since} to {self.step}); {finite.REMEDY}; {finite.from_before(self._newest_saved())}")

    def _newest_saved(self) -> int | None:
        """Step of the newest checkpoint, which rank 0 knows; a collective."""
        return self.world.gather(self.saver.whole())[0]

    def _note_damage(self) -> None:
        """List the damaged rows of each stream in the run's folder; too many of them, over all workers, end the run."""
        counts = torch.tensor([float(len(stream.damaged)) for stream in self.streams.values()], device=self.world.device)
        for (name, stream), total in zip(self.streams.items(), self.world.sum(counts).tolist(), strict=True):
            if total == self.damage_counts.get(name, 0):
                continue
            self.damage_counts[name] = total
            damaged = {key: what for part in self.world.gather(dict(stream.damaged)) for key, what in part.items()}
            if self.world.rank == 0:
                known = self.damage_lists[name]
                known.write(damaged)
                self._say(f"{len(damaged)} damaged row(s) of stream '{name}' put aside so far, listed in {known.url}")
            if len(damaged) > stream.most_damaged:
                raise damage_error(name, stream.manifest, damaged, stream.most_damaged)

    def _record(self, scalars: dict[str, float]) -> None:
        """Write scalars to the run's files and tell the watcher, who may ask for something."""
        if self.tracker is None:
            self._progress({"step": self.step, "total": self.config.train.steps, **scalars})
            return
        with needing_room(str(self.tracker.directory)):
            self.tracker.log(self.step, scalars)

    def _progress(self, record: dict[str, Any]) -> None:
        self.asking.take(self.report({"kind": "progress", **record}))

    def _averaged_models(self) -> dict[str, nn.Module]:
        models = {"student": self.model} | ({"teacher": self.teacher.module} if self.teacher is not None else {})
        for model in models.values():
            self.engine.average_buffers(model)
        return models

    def _evaluate(self, record: bool = True) -> dict[str, dict[str, EvalResult]]:
        """Student and teacher on every evaluation set; each worker takes its own rows, counts are summed."""
        models = self._averaged_models()
        results = {}
        for name in self.config.data.eval:
            manifest, volumes = self.manifests[f"eval/{name}"], self.volumes[name]
            rows = iter_rows(manifest, self.world.rank, self.world.size,
                             (*self.config.model.image_columns, "mask", *(["group"] if volumes else [])), self.storage)
            results[name] = evaluate(
                models, self.coding, samples_of_rows(rows, self.config.data.decode_threads), self.spec,
                normalize=self.normalize, device=self.world.device, reduce=self.world.sum, volumes=volumes,
                autocast=self.engine.autocast_dtype)
        if record and self.world.rank == 0:
            scalars = {f"{name}/{which}/{key}": value for name, by_model in results.items()
                       for which, result in by_model.items() for key, value in result.figures().items()}
            self._record(scalars | {f"{name}/teacher_student_gap": by_model["teacher"].miou - by_model["student"].miou
                                    for name, by_model in results.items() if "teacher" in by_model})
        return results

    def _score(self, results: dict[str, dict[str, EvalResult]]) -> float:
        return next(iter(results.values()))["student"].score if results else -1.0

    def _save(self, results: dict[str, dict[str, EvalResult]]) -> None:
        """Copy all that a checkpoint holds to host memory, and have it written while training goes on."""
        began = time.perf_counter()
        self._note_saved(wait=True)  # at most one is under way, and in memory
        waited = time.perf_counter()
        self._averaged_models()
        optimizer = self.engine.optimizer_state()
        score = self._score(results)
        if score > self.best["score"]:  # on every worker: all must know when the next one is to be saved
            self.best = {"score": score, "step": self.step}
        if self.world.rank > 0:
            return
        meta = {"teacher_updates": self.teacher.updates if self.teacher else 0, "best": self.best,
                "config": self.config.model_dump(mode="json"), "workers": self.world.size,
                "rows_consumed": {name: self.step * batching.batch_size(self.config, name) for name in self.streams},
                "manifests": {name: manifest.hash for name, manifest in self.manifests.items()},
                "versions": checkpoint.versions(), **checkpoint.describe_task(self.book, self.classes)}
        teacher = checkpoint.cpu_state(self.teacher.module) if self.teacher is not None else None
        self.saver.save(checkpoint.Snapshot(self.step, checkpoint.cpu_state(self.model), teacher, optimizer, meta))
        self.saving_times |= {"time/checkpoint_wait": waited - began, "time/checkpoint_copy": time.perf_counter() - waited}

    def _note_saved(self, wait: bool = False) -> None:
        """Tell of a checkpoint that has been written meanwhile, or raise what went wrong with it."""
        saved = self.saver.written(wait)
        if saved is not None:
            self.saving_times["time/checkpoint_write"] = saved.seconds
            self.report({"kind": "checkpoint", "step": saved.step, "url": saved.url})

    def _mirror(self) -> None:
        """Copy curves and pictures to the run's folder when that is a bucket, ahead of a checkpoint: curves that reach further
        than it are cut when it is gone on from, ones that end before it would have a hole."""
        if self.tracker is not None and is_remote(self.run_url):
            self.storage.upload_dir(str(self.tracker.directory), self.run_url)

    def _end_tracking(self) -> None:
        """Close what is written as the run goes on, then copy it to a bucket once more: some sinks write at their end."""
        if self.tracker is not None:
            self.tracker.close()
            self._mirror()

    def _final(self, results: dict[str, dict[str, EvalResult]]) -> dict[str, Any]:
        if self.tracker is not None:
            for name, by_model in results.items():
                self.tracker.table(self.step, f"evaluation/{name}", *score_table(by_model, self.classes.names))
        self._end_tracking()
        plain = {name: {which: result.to_dict() for which, result in by_model.items()} for name, by_model in results.items()}
        return {"step": self.step, "results": plain, "best": self.best, "classes": list(self.classes.names),
                "codebook": self.book.describe() if self.book else "one-hot", "model": self.model_line()}

    def model_line(self) -> str:
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        model = self.config.model
        return f"{model.encoder} + {model.head}, {size:.2f} M parameters, {self.coding.num_outputs} outputs"

    def batch_line(self) -> str:
        train, unlabeled = self.config.train, f" + {self.config.train.unlabeled_batch}" if self.config.needs_unlabeled else ""
        return (f"{train.labeled_batch}{unlabeled} images a step over {self.world.size} worker(s), "
                f"{self.micro_batches} micro-batch(es) each; {batching.lr_line(self.config)}"
                f"{batching.batch_weight_line(self.config, self.world.size * self.micro_batches)}; memory "
                + (self.memory.describe() if self.memory else "not estimated, the model does not run without content"))

    def _say(self, text: str) -> None:
        self.report({"kind": "message", "text": text})

    def close(self) -> None:
        self.asking.close()
        unsaid = self.saver.close()
        if unsaid is not None:  # the run ends by another error; this one is told, not lost
            self._say(f"the last checkpoint was not written: {unsaid}")
        for stream in self.streams.values():
            stream.close()
        if self.tracker is not None:
            self.tracker.close()


class Clock:
    """Steps a second and the share of time spent waiting for data, over one log interval."""

    def __init__(self, streams: dict[str, Stream]) -> None:
        self.streams, self.paused = streams, 0.0
        self.mark: tuple[float, float, int] | None = None
        self.started = time.perf_counter()
        self.last = self.started

    def read(self, step: int) -> dict[str, float]:
        now, waited = time.perf_counter(), sum(stream.wait_seconds for stream in self.streams.values())
        values = {"time/seconds": now - self.started}
        if self.mark is not None:
            then, waited_then, step_then = self.mark
            elapsed = max(now - then - self.paused, 1e-9)
            values |= {"time/steps_per_second": (step - step_then) / elapsed,
                       "time/data_wait_share": min((waited - waited_then) / elapsed, 1.0)}
        self.mark, self.paused, self.last = (now, waited, step), 0.0, now
        return values

    def skip(self) -> None:
        """Leave the time since the last call out of the rate: it went into evaluation or saving."""
        now = time.perf_counter()
        self.paused += now - self.last
        self.last = now


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """A number as a metric: filled in on the device, not copied there."""
    return value.float() if isinstance(value, Tensor) else torch.full((), value, device=device)
