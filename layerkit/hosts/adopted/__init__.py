"""Layers as another runtime has unpacked them."""
