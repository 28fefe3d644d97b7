// The model's activations.

// `1 / (1 + e^-x)`, without an exponential above 1, so that it cannot overflow.
fn sigmoid(x: f32) -> f32 {
    let e = exp(-abs(x));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

// `x sigmoid(x)`.
fn silu(x: f32) -> f32 {
    return x * sigmoid(x);
}

// `ln(1 + e^x)`: x itself above 20, and a series if e^x is small, because `log(1 + e^x)` would lose it.
fn softplus(x: f32) -> f32 {
    if (x > 20.0) {
        return x;
    }
    let e = exp(min(x, 20.0));
    if (e < 0.1) {
        return e * (1.0 - e * (1.0 / 2.0 - e * (1.0 / 3.0 - e * (1.0 / 4.0 - e * (1.0 / 5.0 - e / 6.0)))));
    }
    return log(1.0 + e);
}
