"""What a user calls: Jacobians, Hessians and single derivatives, products, kernels, solutions, and training steps."""
