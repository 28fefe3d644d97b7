"""Muon: momentum, orthogonalised by a Newton-Schulz iteration, for matrices and stacks of matrices."""
import torch


def orthogonal(x, steps=5):
    """The nearest (semi-)orthogonal matrix, roughly: singular values end near 1. In BF16, which is exact enough for that."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(-1, -2) if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Updates have the root mean square of Adam's (0.2), so that one learning rate and weight decay serve both."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape[-2:], []).append(p)
            for shape, params in shapes.items():  # one batch for all matrices of a shape
                updates = []
                for p in params:
                    state = self.state[p]
                    m = state.setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]).reshape(-1, *shape))
                update = orthogonal(torch.cat(updates)) * (0.2 * max(shape) ** 0.5)
                for p, u in zip(params, update.split([len(u) for u in updates])):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u.view_as(p), alpha=group["lr"])
