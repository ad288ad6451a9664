"""Ahead-of-time compiles: every kernel in production shapes, for GPUs that this machine lacks.

The room: `cases` launches the backend on tensors without memory, `absent_gpu` turns each launch
into a compile, `binary` reads the machine code, `limits` names what no binary may do, `table`
prints the result. `tests/gpu/compile_kernels.py` is the command.
"""
