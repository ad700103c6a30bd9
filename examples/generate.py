"""Text from a model split over two processes. Run it as it is, or under torchrun or mpirun:

python examples/generate.py
torchrun --nproc-per-node 2 examples/generate.py
mpirun -n 2 python examples/generate.py

Started plainly, LLM starts the ranks itself; inside a launcher's ranks every rank gets the same result.
"""

from shardwise import LLM, SamplingParams
from shardwise.launch.env import detect

conversation = [{"role": "user", "content": "Name three primary colors."}]
speaks = detect().rank == 0

with LLM("smollm2", tp=2) as llm:
    # A prompt is raw text, token ids, or a conversation for the model's chat template.
    prompts = ["The capital of France is", conversation]
    for completion in llm.generate(prompts, SamplingParams(max_new_tokens=24, stop="\n")):
        if speaks:
            print(completion.text.strip())

    # Tokens as they come, sampled with a seed of their own.
    for event in llm.stream([conversation], SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_new_tokens=24)):
        if speaks:
            print(event.text, end="", flush=True)
    if speaks:
        print(f"\n{llm.last_answer.tokens_per_second:.0f} tokens/s over {llm.transport}")
