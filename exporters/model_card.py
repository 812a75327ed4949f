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


GPTQ_CARD = """---
pipeline_tag: text-generation
tags:
- gptq
- optrot-edge
---
# {name}

{name}, rotated and quantised to GPTQ's format by optrot-edge{version}: {bits:.2f} bits per weight.

| | |
|---|---|
{rows}

{how} this folder; onnxruntime-genai's model builder makes an ONNX model of it.

```bash
{command}
```
"""


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


LOADERS = {  # by whether the grids are symmetric: GPTQModel's own loader wants them so
    True: {"how": "GPTQModel loads", "command": """pip install gptqmodel
python -c "from gptqmodel import GPTQModel; m = GPTQModel.load('.')
print(m.tokenizer.decode(m.generate('Hello')[0]))\""""},
    False: {"how": "transformers, with optimum and GPTQModel, loads", "command": """pip install gptqmodel optimum
python -c "from transformers import pipeline; print(pipeline('text-generation', '.')('Hello'))\""""},
}


def model_card(config: dict, manifest: dict, bits_per_weight: float) -> str:
    """The card of an MLX package with this config.json, made from a checkpoint with this manifest."""
    about, grid = config["optrot"], config.get("quantization")
    online, rows = [name.upper() for name in ("r3", "r4") if about[f"{name}_block"]], _method(about)
    if grid:
        others = sum(isinstance(value, dict) for value in grid.values())
        rows["Grid"] = f"affine, {grid['bits']} bits, groups of {grid['group_size']}" + _others(others)
    return _fill(CARD, config, manifest, rows, bits=bits_per_weight, dtype=config["torch_dtype"],
                 trust=" --trust-remote-code" if "model_file" in config else "",
                 remark=REMARK.format(online=", ".join(online)) if "model_file" in config else "")


def gptq_card(config: dict, manifest: dict, bits_per_weight: float) -> str:
    """The same of a GPTQ package."""
    grid, rows = config["quantization_config"], _method(config["optrot"])
    rows["Grid"] = (f"{'symmetric' if grid['sym'] else 'with zero-points'}, {grid['bits']} bits, groups of "
                    f"{grid['group_size']}" + _others(len(grid.get("dynamic", {}))))
    return _fill(GPTQ_CARD, config, manifest, rows, bits=bits_per_weight, **LOADERS[grid["sym"]])


def onnx_card(config: dict, manifest: dict, bits_per_weight: float) -> str:
    """The same of an ONNX package."""
    rows = _method(config["optrot"])
    rows["Activations"] = "int8 in MatMulNBits" if config["optrot"]["accuracy_level"] == 4 else "float"
    return _fill(ONNX_CARD, config, manifest, rows, bits=bits_per_weight, dtype=config["torch_dtype"],
                 js=config["transformers.js_config"]["dtype"])


def _method(about: dict) -> dict[str, str | None]:
    """How the codes were found."""
    rotation = ", ".join([about["rotation"] or "none", *(name.upper() for name in about["applied"]),
                          *(f"{name} scales" for name in about["scales"])])
    return {"Rotation": rotation, "Quantiser": about["recipe"].get("quantizer")}


def _others(count: int) -> str:
    return f"; {count} matrices have others, see config.json" if count else ""


def _fill(card: str, config: dict, manifest: dict, rows: dict[str, str | None], **fields) -> str:
    about, recipe = config["optrot"], config["optrot"]["recipe"]
    if recipe.get("calibration") not in (None, "none"):
        rows["Calibration"] = f"{recipe['nsamples']} windows of {recipe['seqlen']} tokens, text with SHA-256 " \
                              f"{about['calibration_sha256']}"
    name = (manifest.get("model") or {}).get("name") or config["model_type"]
    return card.format(name=name, version=f" {about['version']}" if about["version"] else "",
                       rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()), **fields)
