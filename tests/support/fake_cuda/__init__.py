"""A CUDA device that is not there: CPU memory behind tensors that say they are on cuda:0.

`simulated` puts it in place of torch's for a while. What a real device would refuse is refused: an
op over tensors of two devices, a Triton launch with a CPU pointer, and in a captured graph whatever
waits for the device or copies from pageable memory. Every wait of the host for the device is
counted with its line. A replay runs exactly what was recorded, over the same memory. Between
streams of a thread, a use of memory that no wait puts behind the use before it is refused too.

It cannot see: races of other kinds, NCCL itself, every rule of a real capture, the numbers of
tensor cores, time.

The room: `ledger` counts and refuses; `tensors` are the tensors and what each op does to them;
`runtime` and `streams` stand in for `torch.cuda`, `launches` for Triton's launcher, `ranks` for
NCCL and for the processes of a group, `symmetric` for memory that ranks share.
"""

from support.fake_cuda.ledger import Ledger
from support.fake_cuda.ranks import simulated_slices, small_halves
from support.fake_cuda.runtime import simulated
from support.fake_cuda.tensors import DeviceTensor

__all__ = ["DeviceTensor", "Ledger", "simulated", "simulated_slices", "small_halves"]
