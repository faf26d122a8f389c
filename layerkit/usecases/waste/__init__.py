"""The plan that takes doubled and hidden bytes out of an image and keeps its layers. PURE.

A layer is **fixed** (it stays byte for byte) or **free** (it is written anew). Whatever layers are fixed, the
free ones can be made so that the root filesystem stays what it is:

* an inode whose topmost layer is fixed is there already: no layer above that one touches it;
* every other inode goes into the *lowest* free layer that holds its content, no higher than where it was, and
  above every fixed layer that would hide it. It gets its final metadata there: the metadata moves down, the
  content never leaves the layer it is taken from;
* a directory goes into every free layer with something in it, as runtimes that unpack each layer alone need it,
  and above the fixed layers that give it other attributes;
* what fixed layers show and the image does not is whited out, in a free layer that hid it before.

Free layers hold nothing that is hidden later, and no marker that hides nothing. All the rest is the choice of
the fixed layers: first only those that must be (the base, and all below a hard link that leaves its layer),
then also those whose stored files would all stay as they are, unless a marker of theirs would hide nothing.
"""

from __future__ import annotations

from layerkit.usecases.waste.planned import Action, Plan, PlannedLayer
from layerkit.usecases.waste.planner import plan

__all__ = ["Action", "Plan", "PlannedLayer", "plan"]
