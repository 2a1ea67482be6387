"""The check of flat.c against torch, once in a process."""

import torch


def agrees() -> bool:
    """Whether the C code computes what torch does, with sites of all kinds and gradients that are there or not."""
    # Not before: the arithmetic asks for this check.
    from ppl_bnn.native.flat import FlatArithmetic, Gradients

    like = torch.empty(0, dtype=torch.float32, device="cpu")
    priors = {"centres": (0.0, 0.5), "precisions": (4.0, 0.5), "logs": (1.0, 0.0)}
    both = [
        FlatArithmetic((70, 5, 300, 80), (0, 0, 1, 1), one, kinds=(0, 1, 0, 2), copies=5, **priors)
        for one in (like, like.double())
    ]
    for one in both:
        for number, buffer in enumerate((one.loc, one.u)):
            buffer.copy_(torch.linspace(-3, 3, len(buffer), device="cpu").cos() * (number + 1))
        one.flips.copy_(torch.linspace(0, 99, one.flips.numel(), device="cpu").sin().sign().view(one.flips.shape))
    sums = [torch.tensor([*one.draw((1, 2, 2**63, 4))], device="cpu") for one in both]
    drawn = [one.values.clone() for one in both]
    given = torch.linspace(-2, 2, 455 + 4 * 80, device="cpu").sin()
    norms = []
    for one in both:
        a, b, c, *copies = given.to(one.loc.dtype).split((70, 5, 300, 80, 80, 80, 80, 80))
        found = [
            Gradients((a,), None, a),
            Gradients((b,), b),
            Gradients(u=c),
            Gradients((*copies[:3], None, copies[4])),
        ]
        norms.append(float(one.gradients(dict(enumerate(found)), 0.25)))
    momenta = [one.to_u.clone() for one in both]
    for one, momentum in zip(both, momenta, strict=True):
        one.ivon_step(momentum, 0.5, (1.0, 2.0, 3.0, 4.0), 0.3, 0.1)
    names = ("to_loc", "to_u", "loc", "u")
    pairs = [(getattr(both[0], name), getattr(both[1], name)) for name in names]
    pairs += [
        (drawn[0], drawn[1]),
        (sums[0], sums[1]),
        tuple(torch.tensor(norms, device="cpu")),
        (momenta[0], momenta[1]),
    ]
    return all(torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5) for a, b in pairs)
