from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from pharmacist_ray.runtime.cores import use_cores
{call}
pages = 48 << 20 >> 12
def touch():
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor = torch.ones(12 << 20)  # 48 MiB
    del tensor
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun
print(torch.get_num_threads(), min(touch() for _ in range(12)) < pages // 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is the GNU C library's")
@pytest.mark.parametrize(("call", "said"), [("use_cores(2)", "2 True"), ("torch.set_num_threads(2)", "2 False")])
def test_freed_memory_is_kept_for_the_next_pass(call: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE.format(call=call)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said
