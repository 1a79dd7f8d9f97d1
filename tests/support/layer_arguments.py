"""Arguments of `decoder_layer` and `decoder_layers`."""

import torch


def arguments(hidden: int = 32, ffn: int = 64, group: int = 32) -> list:
    """Of one token into an empty cache of four: one head of 32, weights of 2 bits."""
    generator = torch.Generator().manual_seed(2)

    def linear(inputs: int, outputs: int) -> list[torch.Tensor]:
        groups = inputs // group
        return [
            torch.randint(0, 256, (outputs, inputs // 4), generator=generator).to(torch.uint8),
            torch.full((outputs, groups), 0.01, dtype=torch.float16),
            torch.tensor([0.9]),
            torch.tensor([-100, -30, 30, 100], dtype=torch.int8).repeat(outputs, groups, 1),
        ]

    def side() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, 1, 4, 16, dtype=torch.uint8), torch.zeros(1, 1, 4, 2, dtype=torch.float16)

    x = torch.randn(1, 1, hidden, generator=generator)
    cos, sin = torch.ones(1, 1, 32), torch.zeros(1, 1, 32)
    return [
        x, cos, sin, None, [torch.ones(hidden), torch.ones(hidden)], 1e-5,
        linear(hidden, 3 * 32), linear(32, hidden), linear(hidden, 2 * ffn), linear(ffn, hidden),
        [group] * 4, [-1] * 4, None, 32, None, ffn, *side(), *side(), None, None, 0, 0.95, 32**-0.5,
    ]  # fmt: skip


def several(layers: int = 3, **settings: int) -> list:
    """Arguments of `decoder_layers` for layers of the same shape."""
    each = [arguments(**settings) for _ in range(layers)]
    for index, one in enumerate(each):  # that differ
        one[4] = [norm + 0.1 * index for norm in one[4]]
        one[6][0] = one[6][0] ^ index
    first = each[0]
    lists = [[value for one in each for value in one[place]] for place in (4, 6, 7, 8, 9, 10, 11)]
    caches = [[one[place] for one in each] for place in range(16, 20)]
    norms, *linears_and_groups = lists
    return [*first[:4], norms, first[5], *linears_and_groups, *first[12:16], *caches, [], [], *first[22:]]
