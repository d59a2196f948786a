"""Compiles the CPU kernels that tests reach late, while others run: a minute where nothing is cached, on another core."""

import dlnlab

PROBLEMS = {"DeepLinearNetwork": "LowRankCompletion", "DiagonalLinearNetwork": "SparseRegression"}

if __name__ == "__main__":  # collecting doctests imports this file
    for network, data in PROBLEMS.items():
        for dtype in ("float64", "float32"):
            model = {"class_path": network, "init_args": {"dtype": dtype, "batch_size": 1}}
            dlnlab.run({"model": model, "data": {"class_path": data}, "trainer": {"max_steps": 2}})
