"""Plots the recurrent state of one head of a snapshot: plot_snapshot.py SNAPSHOT PICTURE LAYER HEAD"""
import sys

import matplotlib
from safetensors import safe_open

matplotlib.use("Agg")
import matplotlib.pyplot as plt

with safe_open(sys.argv[1], framework="numpy") as snapshot:
    state = snapshot.get_tensor(f"state.{sys.argv[3]}")[int(sys.argv[4])]
    tokens = snapshot.get_tensor("tokens")
print(f"{len(tokens)} tokens, {state.shape[0]} x {state.shape[1]}, norm {(state.astype(float) ** 2).sum() ** 0.5:.4f}")
plt.imshow(state, cmap="RdBu")
plt.xlabel("value")
plt.ylabel("key")
plt.savefig(sys.argv[2])
