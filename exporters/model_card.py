"""README.md of a package: what it is, how it was made, how to run it."""

from __future__ import annotations

CARD = """---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- optrot-edge
---
# {name}

{name}, rotated and quantised for MLX by optrot-edge{version}: {bits:.2f} bits per weight, {dtype}.

| | |
|---|---|
{rows}

```bash
pip install mlx-lm
mlx_lm.generate --model . --prompt "Why is the sky blue?"{trust}
```
{remark}"""
REMARK = """
`optrot_model.py` adds the online rotations ({online}) to mlx-lm's own model; read it before you trust it.
"""


def model_card(config: dict, manifest: dict, bits_per_weight: float) -> str:
    """The card of an MLX package with this config.json, made from a checkpoint with this manifest."""
    about, grid = config["optrot"], config.get("quantization")
    online = [name.upper() for name in ("r3", "r4") if about[f"{name}_block"]]
    rows = _rows(about)
    if grid:
        others = sum(isinstance(value, dict) for value in grid.values())
        rows["Grid"] = f"affine, {grid['bits']} bits, groups of {grid['group_size']}" + (
            f"; {others} matrices have others, see config.json" if others else "")
    name = (manifest.get("model") or {}).get("name") or config["model_type"]
    return CARD.format(name=name, version=f" {about['version']}" if about["version"] else "", bits=bits_per_weight,
                       dtype=config["torch_dtype"],
                       rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
                       trust=" --trust-remote-code" if "model_file" in config else "",
                       remark=REMARK.format(online=", ".join(online)) if "model_file" in config else "")


ONNX_CARD = """---
library_name: onnxruntime
pipeline_tag: text-generation
tags:
- onnx
- transformers.js
- optrot-edge
---
# {name}

{name}, rotated and quantised for onnxruntime by optrot-edge{version}: {bits:.2f} bits per weight, {dtype}.

| | |
|---|---|
{rows}

onnxruntime-genai (`pip install onnxruntime-genai`) runs this folder, and so does transformers.js:

```js
const generator = await pipeline("text-generation", MODEL, {{ dtype: "{js}" }});
```
"""


def onnx_card(plan, manifest: dict) -> str:
    """The card of an ONNX package."""
    about = plan.config["optrot"]
    rows = _rows(about) | {"Activations": "int8 in MatMulNBits" if plan.accuracy_level == 4 else "float"}
    return ONNX_CARD.format(name=(manifest.get("model") or {}).get("name") or plan.config["model_type"],
                            version=f" {about['version']}" if about["version"] else "",
                            bits=8 * plan.nbytes / plan.weights, dtype=plan.dtype,
                            js=plan.config["transformers.js_config"]["dtype"],
                            rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()))


def _rows(about: dict) -> dict[str, str]:
    """What a package's table says of how it was made."""
    recipe = about["recipe"]
    rotation = ", ".join([about["rotation"] or "none", *(name.upper() for name in about["applied"]),
                          *(f"{name} scales" for name in about["scales"])])
    rows = {"Rotation": rotation, "Quantiser": recipe.get("quantizer")}
    if recipe.get("calibration") not in (None, "none"):
        rows["Calibration"] = f"{recipe['nsamples']} windows of {recipe['seqlen']} tokens, text with SHA-256 " \
                              f"{about['calibration_sha256']}"
    return rows
