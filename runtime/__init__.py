"""Run a package on a device and measure it: logits, perplexity, KL, speed, report.

Importing any module here needs numpy alone; a runtime (llama.cpp, MLX, torch) is imported when it is used.
"""
