"""Record which training sample changed the parameters how, and ask afterwards which samples mattered.

The thing on disk is a *ledger*. :func:`record` writes one while a model trains, :func:`open` reads it.
"""

from __future__ import annotations

from gradkern.rollback._compact import compact
from gradkern.rollback._conservation import Balance
from gradkern.rollback._estimators import Influence, Scores
from gradkern.rollback._finished import FinishedLedger, finish, open_finished
from gradkern.rollback._ledger import Ledger
from gradkern.rollback._ledger import open_ledger as open
from gradkern.rollback._recorder import RecordableOptimizer, Recorder
from gradkern.rollback._recording import record
from gradkern.rollback._replay import Replay
from gradkern.rollback._runs import mean_over_runs
from gradkern.rollback._self_test import SelfTest
from gradkern.rollback._sketch_index import SketchIndex
from gradkern.rollback._sketches import Sketches, open_sketches
from gradkern.rollback._top import TopScores
from gradkern.rollback._undo import Undone
from gradkern.rollback._verify import Check, Compression, VerifyReport

__all__ = [
    "Balance",
    "Check",
    "Compression",
    "FinishedLedger",
    "Influence",
    "Ledger",
    "RecordableOptimizer",
    "Recorder",
    "Replay",
    "Scores",
    "SelfTest",
    "SketchIndex",
    "Sketches",
    "TopScores",
    "Undone",
    "VerifyReport",
    "compact",
    "finish",
    "mean_over_runs",
    "open",
    "open_finished",
    "open_sketches",
    "record",
]
