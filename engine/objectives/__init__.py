"""Methods of distillation, a file each, and what they share: losses, LPIPS, first weights, published figures."""
