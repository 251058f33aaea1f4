"""Weights in and out: the folder that Hugging Face tools open, llama2.c's files, and llama.cpp's (GGUF).

Read in this order: config_json.py (which family a config is of), folder.py (load and save), stored.py and
tensor_file.py (what lies in the files), quantized_folder.py (weights in fewer bits), links.py (how tensors belong
together), families/ (one small class for each), llama2c.py; gguf.py, over gguf_config.py (its names) and
gguf_tensors.py (its numbers).

Weights are read from safetensors, GGUF or llama2.c's plain numbers only: nothing is unpickled, no remote code is run.
"""

from groundup.model.weights.config_json import config_from_json, config_to_json, family_of, read_config
from groundup.model.weights.folder import load_model, save_model

__all__ = ["config_from_json", "config_to_json", "family_of", "load_model", "read_config", "save_model"]
