"""The arrays that the host computes with: float64, whatever dtype a run has."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
