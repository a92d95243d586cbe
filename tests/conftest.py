"""One thread unless a test asks for more: tests assert bits, not times, and share their cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
