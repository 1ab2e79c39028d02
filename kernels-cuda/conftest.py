"""Loads every op before pytest collects: its importlib mode would otherwise load an op's package by itself, after the family
did, and leave that package where the family has the function of the same name."""

from kernels_cuda import build, testing

for name in build.ops():
    testing.find(name)
