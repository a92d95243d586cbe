"""Reading a ledger: which training samples made the model what it is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradkern.errors import LedgerError, UnstableInfluenceError
from gradkern.loss import Batch, LossFn
from gradkern.rollback._audit import check_files
from gradkern.rollback._conservation import Balance, balance
from gradkern.rollback._estimators import Influence, Scores, needs_replay, require_estimator, score
from gradkern.rollback._reading import read_segments, recorded_ids
from gradkern.rollback._replay import Replay, Replayer
from gradkern.rollback._report import write_report
from gradkern.rollback._rewind import State, StatefulOptimizer, choose_step, require_restorable, restore
from gradkern.rollback._sample_ids import sample_ids
from gradkern.rollback._self_test import SelfTest, choose_subsets, require_sound, run_self_test, untested
from gradkern.rollback._shards import open_store
from gradkern.rollback._sketches import Sketches, open_sketches, write_sketches
from gradkern.rollback._store import StoreReader
from gradkern.rollback._undo import Undone, apply_change, propagate
from gradkern.rollback._verify import Check, VerifyReport, compression, conservation_checks

__all__ = ["Ledger", "open_ledger"]

# Methods of undoing that people ask for and that do harm.
_WHY_NOT = {
    "subtract": ". Taking off what the samples added, without how later steps reacted to it, was measured to be "
    "hundreds of times worse than leaving the model alone"
}


def open_ledger(path: str | os.PathLike[str]) -> Ledger:
    """Open a ledger for reading. Also after a crash: whatever was committed is there.

    One that several ranks recorded has the steps that all of them have; where some go on, a warning says so.

    Args:
        path: The folder given to :func:`gradkern.rollback.record`.

    Raises:
        LedgerError: There is no ledger, it is damaged, or has another format version; or shards of its ranks are
            missing or do not belong together.
        ImportError: safetensors is not installed.
    """
    store = open_store(Path(path))
    ends = [part.steps for part in store.parts]
    if max(ends) > store.steps:
        warnings.warn(
            f"the ranks recorded {ends} steps, in their order; the ledger ends with step {store.steps}, the last that "
            f"all of them have: one was killed, or they are still recording",
            stacklevel=2,
        )
    return Ledger(store)


class Ledger:
    """A recorded run; made by :func:`open_ledger`. Nothing in it is changed by reading."""

    def __init__(self, store: StoreReader) -> None:
        self._store = store
        self._layout = store.layout

    @property
    def steps(self) -> int:
        """Number of committed optimizer steps."""
        return self._store.steps

    @property
    def visits(self) -> int:
        """Number of recorded visits: rows of micro-batches, over all steps."""
        return self._store.visits

    @property
    def shards(self) -> int:
        """Number of ranks that recorded it, each its own samples; 1 without ``DistributedDataParallel``."""
        return len(self._store.parts)

    @property
    def complete(self) -> bool:
        """False when recording was killed, in any rank; the ledger then ends with the last committed step."""
        return self._store.closing is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all committed files, without the catalog."""
        return sum(entry.bytes for entry in self._store.files)

    @property
    def rank(self) -> int:
        """Most directions kept of a sample's gradient of a matrix."""
        return int(self._store.facts["rank"])

    @property
    def bytes_per_visit(self) -> int | None:
        """Most bytes that the records of a visit may take, as given to ``record``; None without such a budget."""
        given = self._store.facts.get("bytes_per_visit")
        return None if given is None else int(given)

    def layer_bytes(self) -> dict[tuple[str, str], int]:
        """Bytes of the records by layer and parameter, from the headers of the files.

        Raises:
            LedgerError: A file is damaged.
        """
        sizes = {(stream.layer, self._layout.parameters[stream.parameter].name): 0 for stream in self._layout.streams}
        for entry in self._store.segments:
            for name, nbytes in self._store.tensor_bytes(entry).items():
                group, *path = name.split("/")
                if group == "stream":
                    stream = self._layout.streams[int(path[0])]
                    sizes[stream.layer, self._layout.parameters[stream.parameter].name] += nbytes
        return sizes

    def explain(
        self,
        model: nn.Module,
        query: Batch,
        k: int = 10,
        *,
        loss_fn: LossFn | None = None,
        estimator: str | None = None,
        mode: str = "run",
        replay: Replay | None = None,
    ) -> list[Influence]:
        """Name the training samples that lowered a query's loss most.

        Args:
            model: The trained model, with the parameters it had when recording ended. Run in eval mode; its
                modes, ``.grad`` and parameters are left as they are.
            query: A batch, see :func:`gradkern.loss.compute_loss`.
            k: Most samples to return.
            loss_fn: ``(output, target) -> scalar``; any scalar function of the output works.
            estimator: ``"ref"``: what the sample's own recorded steps did and how later steps reacted to it, by the
                reweighted empirical Fisher matrix of their samples; for losses that are a cross-entropy.
                ``"direct"``: without the reaction. ``"paper"``: without it too, by taking what the sample added off the
                parameters and evaluating the loss again, so for losses without a gradient as well; reads the ledger
                once and then once more for every 256 MiB of what all samples added. ``"gauss_newton"``: as ``"ref"``,
                with the reaction by the Gauss-Newton matrix of every batch's loss, for any loss, by running the
                training again. ``"metagradient"``: the exact derivative of the query's loss by the weights that the
                sample's rows had in the losses of the run, by running the training again; of Adam, AdamW and SGD. None
                takes ``"ref"``, and for ``mode="run"`` with a warning ``"direct"`` where the ledger lacks what
                ``"ref"`` needs.
            mode: ``"run"``: what would have become of this very run, same order and same start. ``"expected"``: of
                runs like it on average, by half of the reaction; ``"ref"`` alone.
            replay: For ``"gauss_newton"`` and ``"metagradient"``, and for no other: how to train, of a ledger recorded
                with ``replayable=True``.

        Returns:
            At most ``k`` influences, the most helpful first.

        Raises:
            ValueError: ``k`` is below 1, there is no such ``estimator`` or ``mode``, ``replay`` is missing or given in
                vain, or the loss depends on no recorded parameter.
            TypeError: For ``replay``: the model returns neither a tensor nor ``.logits``.
            LedgerError: ``model`` is another model or has other parameter values, a file is damaged, the ledger
                lacks what the estimator that was asked for needs, ``replay`` gives other parameters than were recorded,
                the loss of the run does not come from the model's output alone, or the run is one that
                ``"metagradient"`` cannot differentiate (another optimizer or clip policy, buffers that training
                changed, a loss that is no sum over samples).
            UnstableInfluenceError: Influence grew on its way back to the first step; what ``"ref"`` or
                ``"gauss_newton"`` found is noise. Or a ``"metagradient"``, or the loss without what
                a sample added, is not finite.

        Numerics:
            fp32 sums over the parameters in host memory, fp64 over steps. The preconditioner is smoothed to rows and
            columns: to raise the agreement with retraining, not to save bytes alone.
        """
        if k < 1:
            raise ValueError(f"explain: k must be at least 1, got {k}")
        found = self._score(model, [query], loss_fn, estimator, mode, replay)
        # Stable: of equal scores the smaller id comes first, whatever k is.
        scores, positions = found.scores[0].sort(descending=True, stable=True)
        best = positions[:k]
        errors = torch.full_like(scores, torch.nan) if found.errors is None else found.errors[0]
        triples = zip(found.ids[best].tolist(), scores[:k].tolist(), errors[best].tolist(), strict=True)
        return [Influence(id, score, error) for id, score, error in triples]

    def scores(
        self,
        model: nn.Module,
        query: Batch | list[Batch],
        *,
        loss_fn: LossFn | None = None,
        estimator: str | None = None,
        mode: str = "run",
        replay: Replay | None = None,
    ) -> Scores:
        """Score every recorded sample; arguments and errors as for :meth:`explain`.

        Reads the ledger once, from the last step to the first, holding one segment (of each rank) and three tensors of
        every recorded parameter's size for each query; the time is mostly that of reading where queries are few.
        ``"paper"`` evaluates every query once for each sample instead, many samples at a time where ``torch.func.vmap``
        can run the model and ``loss_fn``. With ``replay`` it is four to seven tensors and the activations of a
        micro-batch for each query, and the training is run once before that, or twice where what its steps started from
        takes more than 256 MiB, of which then about twice the square root of their number are held.

        Args:
            model: See there; likewise what follows.
            query: A batch, or a list of batches to score for each.
            loss_fn: See there.
            estimator: See there.
            mode: See there.
            replay: See there.
        """
        if not isinstance(query, list):
            found = self._score(model, [query], loss_fn, estimator, mode, replay)
            return Scores(found.ids, found.scores[0], None if found.errors is None else found.errors[0])
        if not query:
            raise ValueError("scores: the list of queries is empty, expected at least one batch")
        return self._score(model, query, loss_fn, estimator, mode, replay)

    def _score(
        self,
        model: nn.Module,
        queries: list[Batch],
        loss_fn: LossFn | None,
        estimator: str | None,
        mode: str,
        replay: Replay | None,
    ) -> Scores:
        """One call below :meth:`explain` and :meth:`scores` alike, so that warnings point at the user's line."""
        require_estimator("ref" if estimator is None else estimator, mode, replay)
        self._require_recorded_values(self._layout.trained_parameters(model))
        return score(self._store, model, queries, loss_fn, estimator, mode, replay)

    def report(
        self,
        path: str | os.PathLike[str],
        scores: Scores | None = None,
        *,
        show: Callable[[int], object] | None = None,
        queries: Sequence[object] | None = None,
        k: int = 10,
        title: str = "Which training samples did this?",
        verified: VerifyReport | SelfTest | None = None,
    ) -> None:
        """Write a self-contained HTML page on what the ledger answered, and on the ledger.

        Of each query it has the samples with the highest and lowest scores, with their errors, and how those of all are
        spread; of the ledger its size and settings, and of each layer its share of the recorded update and of the
        bytes. The page has all its images inside, runs no script and loads nothing. It appears complete or not at all;
        an older one is replaced.

        What shows a sample or query is a text, an image, or a tuple of those, such as an image and its label. Images
        are of Pillow, or tensors or numpy arrays in uint8 (0 to 255), bool or a floating dtype (0 to 1), of shape
        ``(height, width)`` or, with 1, 3 or 4 channels, ``(channels, height, width)`` for tensors and
        ``(height, width, channels)`` for arrays. Of texts the first 2,000 characters are shown; images with more than
        256 pixels on a side are made smaller.

        Args:
            path: File to write.
            scores: What :meth:`scores` returned, of one query or several. None writes of the ledger alone.
            show: Gives what shows a sample from its id; called once for each id that is listed. None lists ids alone.
            queries: What shows each query, in the order of ``scores``.
            k: Most samples to list of those that helped, and of those that harmed.
            title: Heading of the page.
            verified: What :meth:`verify` or :meth:`self_test` returned, to be included.

        Raises:
            TypeError: ``scores`` or something to show is none of the above.
            ValueError: ``k`` is below 1, scores are not finite or not of the shape of their ids, there are not as many
                ``queries`` as in ``scores``, or an image has another shape, dtype or mode or values out of range.
            LedgerError: A file is damaged.
            ImportError: There are images and Pillow is not installed.
            OSError: The folder does not exist or cannot be written.
        """
        write_report(
            Path(path),
            self._store,
            self.layer_bytes(),
            scores,
            show=show,
            queries=queries,
            k=k,
            title=title,
            verified=verified,
        )

    def sketch(self, path: str | os.PathLike[str], *, width: int = 256, seed: int = 0) -> Sketches:
        """Compress what every sample did to a few hundred bytes, in one file, to search millions in milliseconds.

        Sketches answer as ``estimator="direct"`` does, with an error: the estimate of the score ``⟨v, q⟩`` of a sample
        has that mean over seeds, and a standard deviation of at most ``sqrt((‖v‖² ‖q‖² + ⟨v, q⟩²) / width)``, plus what
        rounding to int8 adds, a hundredth of that at 256.

        Costs as much as ``width`` queries by ``direct``. Memory is ``4 * width`` bytes a sample and, beside a segment,
        256 MiB, or three tensors of every recorded parameter's size if that is more; the ledger is read as many times
        as the random functions need passes of that size, and once for its ids.

        Args:
            path: File to create.
            width: Numbers that a sample is compressed to, from 1 to 65,536.
            seed: Of the random projection, from 0 to 2**63 - 1.

        Returns:
            The sketches, opened.

        Raises:
            ValueError: ``width`` or ``seed`` is out of range.
            LedgerError: ``path`` exists, the ledger is not complete or damaged, or its training diverged.
        """
        write_sketches(self._store, Path(path), width, seed)
        return open_sketches(path)

    def open_sketches(self, path: str | os.PathLike[str]) -> Sketches:
        """Open what :meth:`sketch` wrote, and refuse sketches of another ledger or of this one at another time.

        :func:`gradkern.rollback.open_sketches` does without the ledger.

        Raises:
            LedgerError: They are of another ledger, or see there.
        """
        found = open_sketches(path)
        closing = self._store.closing
        mine = (self._store.facts.get("ledger_id"), closing.parameter_digest if closing else None)
        if found.origin != mine:
            raise LedgerError(
                f"{os.fspath(path)!r} holds sketches of another ledger ({found.origin[0]}) than this one ({mine[0]}), "
                "or of this one before it was recorded further; write them again with sketch()"
            )
        return found

    def undo(
        self,
        model: nn.Module,
        ids: Sequence[int] | torch.Tensor,
        *,
        method: str = "exact",
        replay: Replay | None = None,
        probe: Batch | None = None,
        share: float = 0.5,
        progress: Callable[[int, int], None] | None = None,
    ) -> Undone:
        """Take samples back: make the model as if they had never been trained on.

        Args:
            model: The trained model, with the parameters it had when recording ended; left as it is.
            ids: Of the samples.
            method: ``"exact"`` trains again, from the recorded start and in the recorded order, with the rows of these
                samples left out of their micro-batches and the random numbers of every micro-batch as they were: bit
                for bit what such a training gives. ``"fast"`` needs no training data: it carries the absence of the
                samples through the recorded steps as ``estimator="ref"`` carries influence, to first order.
            replay: For ``"exact"``: how to train. It is tried out first, on the whole training as it was.
            probe: For ``"fast"``: inputs, as in a query, on which the outputs before and after are compared.
            share: For ``"fast"``: of the change that is made. Half of it was on the safe side in all our measurements.
            progress: For ``"exact"``: called with the number of steps made and of all, of both trainings.

        Returns:
            The model that comes out, and how far to trust it.

        Raises:
            ValueError: ``ids`` are empty, ``method`` is neither, what it needs is missing, ``share`` is not in (0, 1].
            TypeError: ``ids`` are not integers, or ``model`` returns neither a tensor nor ``.logits``.
            LedgerError: An id was never recorded, ``model`` is another model or has other parameter values, a file is
                damaged, the ledger lacks what the method needs, or ``replay`` gives other parameters than were
                recorded.
            UndoRefusedError: ``"fast"`` cannot be trusted: the change grew on its way, or the outputs on ``probe`` are
                far from linear in it.
        """
        if method not in ("exact", "fast"):
            raise ValueError(f"undo: method must be 'exact' or 'fast', got {method!r}{_WHY_NOT.get(method, '')}")
        forgotten = torch.unique(sample_ids(ids, "undo"))
        parameters = self._layout.trained_parameters(model)
        self._require_recorded_values(parameters)
        missing = forgotten[~torch.isin(forgotten, recorded_ids(self._store))]
        if len(missing):
            raise LedgerError(
                f"undo: {len(missing)} of {len(forgotten)} ids were never recorded, the first of them "
                f"{missing[:5].tolist()}; pass ids as given to recorder.batch"
            )
        if method == "exact":
            if replay is None:
                raise ValueError("undo: method='exact' trains again and needs replay=Replay(fetch, make_optimizer)")
            replayer = Replayer(self._store, model, replay, otherwise="method='fast'")
            told = progress or _untold
            replayer.check(lambda step, total: told(step, 2 * total))
            return Undone(replayer.train(forgotten, lambda step, total: told(total + step, 2 * total)), "exact")
        if probe is None:
            raise ValueError("undo: method='fast' needs probe=, inputs on which to compare the outputs")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"undo: share must be above 0 and at most 1, got {share}")
        owned = self._layout.owned(parameters)
        changes, growth = propagate(self._layout, owned, read_segments(self._store), forgotten)
        named = {self._layout.parameters[index].name: change for index, change in changes.items()}
        return apply_change(model, named, growth, probe, share)

    def rewind(self, model: nn.Module, optimizer: StatefulOptimizer, *, steps: int) -> dict[str, Any]:
        """Go back to one of the last steps of a recording that was closed, from the states that it kept.

        The same as :meth:`Recorder.rewind` for a recording that has ended, by an exception say, also in a new process::

            resume = ledger.rewind(model, optimizer, steps=3)
            recorder = gk.rollback.record(model, optimizer, path, resume=resume)

        The ledger is left as it is; ``record`` takes out what it holds of later steps.

        Args:
            model: Of the recorded configuration; its trained parameters and its buffers are changed. Parameters that
                were not trained must be those of the run.
            optimizer: Made as for the recording; its state is changed, its options are not.
            steps: How many of the ledger's steps to take back, at most ``rewind`` of ``record``; 0 gives the end.

        Returns:
            What ``record(..., resume=)`` needs to go on from there.

        Raises:
            LedgerError: The recording kept no states, or was killed before it could write them, or not that one; it was
                made by several ranks; ``model`` or ``optimizer`` are not the recorded ones, or a file is damaged.
                Nothing has been changed then.
            ValueError: ``steps`` is negative, or the optimizer clips by another policy. Likewise.
        """
        if self.shards > 1:
            raise LedgerError(
                "rewind: a ledger of several ranks cannot be gone back in as a whole; call recorder.rewind() in every "
                "rank before closing, or load a checkpoint of your own and record(..., resume=)"
            )
        parameters = self._layout.trained_parameters(model)
        named = {info.name: each for info, each in zip(self._layout.parameters, parameters, strict=True)}
        kept = {entry.end_step: entry for entry in self._store.files if entry.role == "state"}
        if not kept:
            raise LedgerError(
                "rewind: the ledger has no states to go back to: it was recorded without rewind=, or killed before "
                "close(); load a checkpoint of your own"
            )
        wanted = choose_step("rewind", self.steps, steps, list(kept))
        state = State.from_file(wanted, self._store.load(kept[wanted]))
        require_restorable(state, optimizer, named)
        restore(state, model, optimizer, named)
        return state.resume(self._store.facts.get("ledger_id"), self._layout)

    def conservation(self, model: nn.Module) -> Balance:
        """Recompute how well the recorded changes add up to the model's, from the files and the model.

        Args:
            model: The trained model, with the parameters it had when recording ended.

        Raises:
            LedgerError: The ledger is not complete, a file is damaged, or ``model`` is another model.
        """
        closing = self._store.closing
        if closing is None:
            raise LedgerError(
                f"conservation cannot be checked: recording ended without close() after {self.steps} "
                f"committed steps, so the sums were never written; explain() works, verify() needs a complete ledger"
            )
        return balance(
            self._layout.parameters,
            self._store.load_role("initial"),
            self._store.load_role("deltas"),
            closing.decays,
            closing.roundings,
            self._layout.trained_parameters(model),
            self.steps,
        )

    def verify(self, model: nn.Module | None = None) -> VerifyReport:
        """Check the ledger's files, and with ``model`` the conservation law.

        Args:
            model: The trained model, with the parameters it had when recording ended. Without it the law
                cannot be checked and the report does not pass.

        Returns:
            The report. Damaged files, an incomplete ledger and a broken law are failed checks, not exceptions.

        Raises:
            LedgerError: ``model`` is another model than the recorded one.
        """
        if model is not None:
            self._layout.trained_parameters(model)
        found = check_files(self._store)
        checks, files = list(found.checks), found.checks[0]
        if model is not None and self.complete and files.passed:
            checks += conservation_checks(self.conservation(model), self._layout.parameters, self.steps)
        else:
            reason = (
                "pass the trained model to check it"
                if model is None
                else "recording ended without close()" + " in all ranks after the same step" * (self.shards > 1)
                if not self.complete
                else "a file is damaged"
            )
            checks.append(Check("conservation", None, None, None, reason))
        return VerifyReport(tuple(checks), compression(self._layout, found.fidelity))

    def self_test(
        self,
        model: nn.Module,
        queries: list[Batch],
        *,
        replay: Replay,
        loss_fn: LossFn | None = None,
        estimator: str | None = None,
        subsets: int | None = None,
        share: float = 0.1,
        seed: int = 0,
        least_cosine: float = 0.5,
        least_lds: float = 0.3,
        progress: Callable[[int, int], None] | None = None,
    ) -> SelfTest:
        """Test explanations on the model and the data that they are about: by training again without some samples.

        Checks the ledger as :meth:`verify` does, how well its records stand for exact gradients, and whether scores
        foretell retraining: random subsets of samples are left out of the training, in the sense of ``undo``, and the
        losses of the models that come out are compared with the sums of the scores of what was left out, by the *linear
        datamodeling score*: the mean over queries of Spearman's rank correlation over subsets. 0 is chance, 1 a perfect
        order.

        Models are trained together, in stacks of 256 MiB, where ``torch.func.vmap`` can run the model and ``loss_fn``
        and the optimizer is gradkern's ``AdamW``, ``Adam`` or ``SGD`` in fp32 on the CPU, clipping by ``max_norm`` or
        not at all; the first is also trained alone, and their losses must be closer than 5 % of what leaving its
        samples out changed. Otherwise fewer of them are trained one by one, and the report says why.

        Args:
            model: The trained model, with the parameters it had when recording ended; left as it is.
            queries: Batches, best of data that was held out.
            replay: How to train, of a ledger recorded with ``replayable=True``.
            loss_fn: Of the queries; None takes that of ``replay``.
            estimator: Whose scores are tested; see :meth:`explain`.
            subsets: Models to train, at least 10; None takes 200, or 25 where they are trained one by one.
            share: Of the samples that each does without.
            seed: Of the draw of subsets.
            least_cosine: Mean cosine of records and exact gradients that passes. Compression throws away what matters
                little as well, so that 0.5 is a bound for the grossly wrong.
            least_lds: What the lower end of the 95 % interval of the linear datamodeling score must reach. The interval
                is that of the draw of subsets alone, by the jackknife. On an MLP of 6,570 parameters trained on digits
                ``"ref"`` had 0.52 to 0.68 by share, ``"direct"`` 0.20 to 0.30.
            progress: Called with the number of steps made and of all; the latter changes once it is known whether
                models can be trained together.

        Returns:
            The report. Damaged files, a broken law, an estimator that refuses the run as unstable and models that
            diverge are checks that did not pass, not exceptions.

        Raises:
            ValueError: ``queries`` are empty, a number is out of range, there is no such estimator, or the training
                fails without some samples (BatchNorm takes no micro-batch of one row).
            LedgerError: ``model`` is another model or has other parameter values, the ledger was recorded without
                ``replayable=True``, lacks what the estimator needs, or ``replay`` gives other parameters than were
                recorded.
        """
        require_sound(queries, subsets, share)
        given = replay if needs_replay(estimator, "run") else None
        loss_fn = replay.loss_fn if loss_fn is None else loss_fn
        replayer = Replayer(self._store, model, replay, otherwise="verify(), which trains nothing")
        report = self.verify(model)
        least = (least_cosine, least_lds)
        if not all(check.passed for check in report.checks[:2]):
            return untested(report, *least, "the ledger is damaged", passed=None)
        left_out = choose_subsets(len(recorded_ids(self._store)), subsets, share, seed)
        try:
            scores = self._score(model, queries, loss_fn, estimator, "run", given)
        except UnstableInfluenceError as error:
            return untested(report, *least, str(error), passed=False)
        told = progress or _untold
        return run_self_test(report, *least, scores, left_out, subsets, replayer, queries, loss_fn, told)

    def _require_recorded_values(self, parameters: tuple[nn.Parameter, ...]) -> None:
        """Influence is about the parameters that the recorded steps ended with, and no others."""
        closing = self._store.closing
        if closing is None:
            warnings.warn(
                f"recording ended without close(): the ledger ends with step {self.steps} and cannot tell "
                f"whether the model has the parameters of that step",
                stacklevel=4,
            )
            return
        if self._layout.digest(parameters) != closing.parameter_digest:
            raise LedgerError(
                "the model's parameters differ from those at the end of the recording, and influence on them "
                "was never recorded; load the parameters of the recorded run's last step into the model"
            )


def _untold(step: int, total: int) -> None:
    """Nobody asked for progress."""
