//! Kimi Delta Attention by its definition: convolution, gates, the recurrence one token at a time, the gated norm.

use super::{sigmoid, silu};

/// `y_t[c] = silu(sum_j w[c, j] x_{t - taps + 1 + j}[c])` with the inputs before in `conv_state` `[channels, taps - 1]`,
/// oldest first. Returns the outputs `[T, channels]` and the convolution state after each number of tokens `0..=T`.
#[must_use]
pub fn short_conv(
    input: &[f64],
    weight: &[f64],
    channels: usize,
    conv_state: &[f64],
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let taps = weight.len() / channels;
    let mut conv_state = conv_state.to_vec();
    let (mut output, mut conv_states) = (Vec::new(), vec![conv_state.clone()]);
    for row in input.chunks_exact(channels) {
        for c in 0..channels {
            let mut window: Vec<f64> = conv_state[c * (taps - 1)..(c + 1) * (taps - 1)].to_vec();
            window.push(row[c]);
            let sum: f64 = (0..taps).map(|j| weight[c * taps + j] * window[j]).sum();
            output.push(silu(sum));
            conv_state[c * (taps - 1)..(c + 1) * (taps - 1)].copy_from_slice(&window[1..]);
        }
        conv_states.push(conv_state.clone());
    }
    (output, conv_states)
}

/// `-exp(A_log[h]) softplus(decay + dt_bias)`: `[T, H * K]`.
#[must_use]
pub fn log_decay(decay: &[f64], a_log: &[f64], dt_bias: &[f64]) -> Vec<f64> {
    let (channels, width) = (dt_bias.len(), dt_bias.len() / a_log.len());
    let softplus = |x: f64| if x > 20.0 { x } else { x.exp().ln_1p() };
    decay
        .iter()
        .enumerate()
        .map(|(i, x)| -a_log[i % channels / width].exp() * softplus(x + dt_bias[i % channels]))
        .collect()
}

/// `sigmoid(write)`: `[T, H]`.
#[must_use]
pub fn write_strength(write: &[f64]) -> Vec<f64> {
    write.iter().map(|x| sigmoid(*x)).collect()
}

/// `RMSNorm_head(input) * weight * sigmoid(gate)`, the norm over each `weight.len()` elements.
#[must_use]
pub fn gated_norm(input: &[f64], gate: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let normed = super::rms_norm(input, weight, eps);
    normed
        .iter()
        .zip(gate)
        .map(|(x, gate)| x * sigmoid(*gate))
        .collect()
}

/// The recurrence of one sequence (Kimi Linear, equation 1).
pub struct Recurrence {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values and states; head h reads key head `h / (value_heads / key_heads)`.
    pub value_heads: usize,
    /// Width K.
    pub key_width: usize,
    /// Width V.
    pub value_width: usize,
    /// `[value_heads, K, V]`.
    pub state: Vec<f64>,
}

impl Recurrence {
    /// One token: `qkv` with queries, keys and values side by side, `gates` `[value_heads, K]`, `beta` `[value_heads]`.
    /// Returns the output `[value_heads, V]`.
    pub fn token(&mut self, qkv: &[f64], gates: &[f64], beta: &[f64]) -> Vec<f64> {
        let (k, v) = (self.key_width, self.value_width);
        let mut output = vec![0.0; self.value_heads * v];
        for head in 0..self.value_heads {
            let key_head = head / (self.value_heads / self.key_heads);
            let normalise = |x: &[f64], scale: f64| -> Vec<f64> {
                let norm = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                x.iter().map(|x| x / norm * scale).collect()
            };
            let row = |part: usize| {
                let first = (part * self.key_heads + key_head) * k;
                &qkv[first..first + k]
            };
            let (query, key) = (
                normalise(row(0), (k as f64).powf(-0.5)),
                normalise(row(1), 1.0),
            );
            let value = &qkv[2 * self.key_heads * k + head * v..][..v];
            let state = &mut self.state[head * k * v..(head + 1) * k * v];
            // S <- diag(exp(g)) S;  answer = S^T k
            let mut answer = vec![0.0; v];
            for d in 0..k {
                let decay = gates[head * k + d].exp();
                for e in 0..v {
                    state[d * v + e] *= decay;
                    answer[e] += state[d * v + e] * key[d];
                }
            }
            // S <- S + k (beta (v - answer))^T;  o = S^T q
            let output = &mut output[head * v..(head + 1) * v];
            for d in 0..k {
                for e in 0..v {
                    state[d * v + e] += key[d] * beta[head] * (value[e] - answer[e]);
                    output[e] += state[d * v + e] * query[d];
                }
            }
        }
        output
    }

    /// Tokens in order: `qkv` `[T, channels]`, `gates` `[T, value_heads * K]`, `beta` `[T, value_heads]`.
    pub fn tokens(&mut self, qkv: &[f64], gates: &[f64], beta: &[f64]) -> Vec<f64> {
        let channels = 2 * self.key_heads * self.key_width + self.value_heads * self.value_width;
        let mut output = Vec::new();
        for t in 0..beta.len() / self.value_heads {
            let width = self.value_heads * self.key_width;
            output.extend(self.token(
                &qkv[t * channels..(t + 1) * channels],
                &gates[t * width..(t + 1) * width],
                &beta[t * self.value_heads..(t + 1) * self.value_heads],
            ));
        }
        output
    }
}
