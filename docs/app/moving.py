"""Makes a moving picture of the app's panels from frames: moving.py FOLDER OUT.gif"""

import sys
from pathlib import Path

from PIL import Image

# The panels at the right: the state above, what it remembers below.
PANELS = (571, 26, 1280, 660)
# Milliseconds of a frame, and of the last one.
FRAME, END = 500, 3000

# Two tokens a frame, which halves the file; the last one is among them.
paths = sorted(Path(sys.argv[1]).glob("frame-*.png"))[::-2][::-1]
if not paths:
    sys.exit(f"error: there is no frame in {sys.argv[1]}")
frames = [Image.open(path).convert("RGB").crop(PANELS) for path in paths]
# One palette for all of them, so that what does not change costs no bytes.
width, height = frames[0].size
some = [frames[0], frames[len(frames) // 2], frames[-1]]
strip = Image.new("RGB", (width, height * len(some)))
for at, frame in enumerate(some):
    strip.paste(frame, (0, at * height))
palette = strip.quantize(96, dither=Image.Dither.NONE)
frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
times = [FRAME] * (len(frames) - 1) + [END]
frames[0].save(sys.argv[2], save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
