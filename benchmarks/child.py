"""One measurement in a process of its own: `python -m benchmarks.child SPEC RESULT`, called by `measure.py`."""

import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.records import Options
from benchmarks.workloads import find_case


def main(spec_text: str, result: Path) -> None:
    """Do what `spec_text` (JSON) names and write the measurement as JSON to `result`."""
    spec = json.loads(spec_text)
    options = Options(**spec["options"])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    case = find_case(spec["workload"], spec["case"], options.device, options.quick)
    contender = next(c for c in case.contenders if c.label == spec["contender"])
    module, _, name = contender.target.partition(":")
    work = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    measurement = work(case.settings, options, **contender.options)
    result.write_text(json.dumps(measurement.as_dict()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
