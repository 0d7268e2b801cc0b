"""Reading and writing a DSRL file of 200k rows, at BallCircle's and AntCircle's widths (target: read in under 1 s).

    python benchmarks/bench_hdf5.py [rows]
"""
import resource
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from saferule.hdf5 import chain_fraction, read_hdf5, write_hdf5

REPEATS = 5


def recording(rows: int, n_obs: int, n_act: int, horizon: int = 200) -> dict[str, np.ndarray]:
    """Smooth random walks, chained like a recording: about as compressible as simulator data."""
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(rows // horizon, horizon + 1, n_obs)).astype(np.float32)
    track = np.cumsum(0.05 * steps, axis=1, dtype=np.float32)
    n = rows // horizon * horizon
    return {"obs": track[:, :-1].reshape(n, -1), "next_obs": track[:, 1:].reshape(n, -1),
            "action": rng.uniform(-1, 1, (n, n_act)).astype(np.float32), "reward": rng.random(n, np.float32),
            "cost": (rng.random(n) < 0.2).astype(np.float32), "terminal": np.zeros(n, bool),
            "timeout": np.arange(n) % horizon == horizon - 1}


def best(call, *args) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call(*args)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(rows: int = 200_000) -> None:
    print(f"{'task':<24}{'rows':>9}{'MB':>7}{'write s':>9}{'read s':>9}{'chain s':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for name, n_obs, n_act in (("BallCircle", 8, 2), ("AntCircle", 34, 8)):
            columns, path = recording(rows, n_obs, n_act), Path(folder) / f"{name}.hdf5"
            start = time.perf_counter()
            write_hdf5(path, columns)
            wrote = time.perf_counter() - start
            print(f"{name:<24}{rows:>9,}{path.stat().st_size / 1e6:>7.1f}{wrote:>9.2f}{best(read_hdf5, path):>9.3f}"
                  f"{best(chain_fraction, columns):>9.3f}")
            with h5py.File(path) as source, h5py.File(Path(folder) / "wide.hdf5", "w") as f:
                for key, dset in source.items():          # as some public files are: float64, larger chunks
                    values = dset[()]
                    f.create_dataset(key, data=values.astype(np.float64), compression="gzip", chunks=values.shape)
            wide = Path(folder) / "wide.hdf5"
            print(f"{name + ', float64':<24}{rows:>9,}{wide.stat().st_size / 1e6:>7.1f}{'':>9}{best(read_hdf5, wide):>9.3f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
