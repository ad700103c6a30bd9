"""Text from a model split over two processes. Run it as it is, or under torchrun or mpirun:

python examples/generate.py
torchrun --nproc-per-node 2 examples/generate.py
mpirun -n 2 python examples/generate.py

Started plainly, LLM starts the ranks itself; inside a launcher's ranks every rank gets the same result.
"""

from shardwise import LLM, SamplingParams
from shardwise.launch.env import detect

with LLM("smollm2", tp=2) as llm:
    for completion in llm.generate(
        [[{"role": "user", "content": "Name three primary colors."}], "The capital of France is"],
        SamplingParams(max_new_tokens=24),
    ):
        if detect().rank == 0:
            print(completion.text)
