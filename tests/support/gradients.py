"""A function's result and its gradients."""


def with_gradients(function, inputs, grad):
    """The result, then the gradient of `(result * grad).sum()` by each input."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    result = function(*leaves)
    result.backward(grad)
    return [result.detach(), *(leaf.grad for leaf in leaves)]
