//! Latent attention by its definition: keys and values expanded for every position, one softmax per query.

/// Rows `[c' | k_pe]` of `input` `[T, latent + rope]`: the latent part normalised, the shared part unchanged.
#[must_use]
pub fn append(input: &[f64], weight: &[f64], rope: usize, eps: f32) -> Vec<f64> {
    let latent = weight.len();
    let mut rows = Vec::with_capacity(input.len());
    for row in input.chunks_exact(latent + rope) {
        rows.extend(super::rms_norm(&row[..latent], weight, eps));
        rows.extend_from_slice(&row[latent..]);
    }
    rows
}

/// The widths of one attention.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Heads.
    pub heads: usize,
    /// Width of the latent.
    pub latent: usize,
    /// Width of the expanded part of a key.
    pub nope: usize,
    /// Width of the shared part of a key.
    pub rope: usize,
    /// Width of a value.
    pub value: usize,
}

impl Attention {
    /// Queries `[T, heads * (nope + rope)]`, the first at `position`, over the latent `rows` of positions 0.. :
    /// `[T, heads * value]`.
    #[must_use]
    pub fn attend(&self, queries: &[f64], kv_b: &[f64], rows: &[f64], position: usize) -> Vec<f64> {
        let Self {
            heads,
            latent,
            nope,
            rope,
            value,
        } = *self;
        let (key, width) = (nope + rope, latent + rope);
        let tokens = queries.len() / (heads * key);
        let mut output = vec![0.0; tokens * heads * value];
        for head in 0..heads {
            let expansion = &kv_b[head * (nope + value) * latent..][..(nope + value) * latent];
            // [positions, nope + value]
            let expanded: Vec<f64> = rows
                .chunks_exact(width)
                .flat_map(|row| super::linear(&row[..latent], expansion, latent))
                .collect();
            for t in 0..tokens {
                let query = &queries[(t * heads + head) * key..][..key];
                let scores: Vec<f64> = (0..=position + t)
                    .map(|j| {
                        let own = &expanded[j * (nope + value)..][..nope];
                        let shared = &rows[j * width + latent..(j + 1) * width];
                        let dot: f64 = own
                            .iter()
                            .chain(shared)
                            .zip(query)
                            .map(|(k, q)| k * q)
                            .sum();
                        dot / (key as f64).sqrt()
                    })
                    .collect();
                let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - greatest).exp()).sum();
                let output = &mut output[(t * heads + head) * value..][..value];
                for (j, score) in scores.iter().enumerate() {
                    let weight = (score - greatest).exp() / sum;
                    let values = &expanded[j * (nope + value) + nope..][..value];
                    for (output, value) in output.iter_mut().zip(values) {
                        *output += weight * value;
                    }
                }
            }
        }
        output
    }
}
