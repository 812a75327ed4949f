"""A multiple choice of our own, as the harness's YAML file."""

from __future__ import annotations

import json
from pathlib import Path

ITEMS = [
    {"ctx": "A list is", "endings": ["mutable.", "a number that cannot be changed at all.", "x"], "gold": 0},
    {"ctx": "The statement for", "endings": ["iterates over a sequence", "ends a function", "is"], "gold": 0},
    {"ctx": "Names are bound by", "endings": ["assignment", "the garbage collector of the heap", "no"], "gold": 2},
    {"ctx": "", "endings": ["An empty context", "Or none", "if"], "gold": 1},
    {"ctx": "Strings ", "endings": ["are immutable sequences", "are functions", "are"], "gold": 2},
    *({"ctx": f"Item {n} of the list", "endings": [f"is {n}", "is not there at all", "was removed"], "gold": n % 3}
      for n in range(7)),
]
METRICS = {"acc_norm": "  - metric: acc\n  - metric: acc_norm\n", "acc": "  - metric: acc\n"}


def save_task(folder: Path, name: str, metric: str = "acc_norm", output_type: str = "multiple_choice") -> str:
    """Path of a task of this name over ITEMS."""
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    choices = "doc_to_choice: endings\n" if output_type == "multiple_choice" else ""
    path.write_text(f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: {data}\n"
                    f"output_type: {output_type}\nvalidation_split: validation\ndoc_to_text: \"{{{{ctx}}}}\"\n"
                    f"doc_to_target: gold\n{choices}metric_list:\n{METRICS[metric]}")
    return str(path)
