#!/usr/bin/env python3
"""Read a GGUF with the package `gguf` and write the values of some of its tensors, under their names there, to a safetensors file.

    python read_gguf.py FILE.gguf OUT.safetensors NAME...

Prints one JSON object: the keys that are not lists, and the number of elements of those that are.
"""
import json, sys

import gguf
import numpy as np
from safetensors.numpy import save_file

file, out, names = sys.argv[1], sys.argv[2], sys.argv[3:]
reader = gguf.GGUFReader(file)
tensors = {tensor.name: tensor for tensor in reader.tensors}
values = {}
for name in names:
    tensor = tensors[name]
    shape = [int(size) for size in reversed(tensor.shape)]
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    values[name] = np.ascontiguousarray(found).reshape(shape)
save_file(values, out)
keys = {}
for name, field in reader.fields.items():
    found = field.contents()
    keys[name] = len(found) if isinstance(found, list) else found
print(json.dumps(keys))
