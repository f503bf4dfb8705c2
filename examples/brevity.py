"""Pay for brevity: 1 for an empty response, 0 at 100 tokens, and on down.

Beside the paper's rewards, with a small weight:

    torchrun train_grpo.py --rewards deg len examples/brevity.py:brevity \\
        --reward-weights 1 1 0.5 --out runs/brevity
"""


def brevity(response, record):
    return 1 - response.length / 100
