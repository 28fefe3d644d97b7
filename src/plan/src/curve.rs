//! A monotone curve through measured points.
//!
//! Cubic Hermite pieces with the slopes of Fritsch and Butland (SIAM J. Sci. Stat. Comput. 5(2), 1984): between two points
//! the curve stays in their range, so that a longer prompt never costs less. Beyond the ends it is linear.

/// A curve through points of increasing x and non-decreasing y.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Curve {
    xs: Vec<f64>,
    ys: Vec<f64>,
    slopes: Vec<f64>,
}

impl Curve {
    /// Through `points` (x, y): at least one, x strictly increasing, y positive and non-decreasing, as checked by the caller.
    pub(crate) fn through(points: &[(f64, f64)]) -> Self {
        let (xs, ys): (Vec<f64>, Vec<f64>) = points.iter().copied().unzip();
        let slopes = match points {
            // One point does not determine a slope; assume a cost proportional to the length.
            [(x, y)] => vec![y / x],
            _ => slopes(&xs, &ys),
        };
        Self { xs, ys, slopes }
    }

    /// The curve at `x`, at least 0.
    pub(crate) fn at(&self, x: f64) -> f64 {
        let last = self.xs.len() - 1;
        if x <= self.xs[0] {
            // The line before the first point must not be below 0 at x = 0.
            let slope = self.slopes[0].min(self.ys[0] / self.xs[0]);
            return self.ys[0] - slope * (self.xs[0] - x);
        }
        if x >= self.xs[last] {
            return self.ys[last] + self.slopes[last] * (x - self.xs[last]);
        }
        let i = self.xs.partition_point(|knot| *knot <= x) - 1;
        let h = self.xs[i + 1] - self.xs[i];
        let s = (x - self.xs[i]) / h;
        let (s2, s3) = (s * s, s * s * s);
        (2.0 * s3 - 3.0 * s2 + 1.0) * self.ys[i]
            + (s3 - 2.0 * s2 + s) * h * self.slopes[i]
            + (3.0 * s2 - 2.0 * s3) * self.ys[i + 1]
            + (s3 - s2) * h * self.slopes[i + 1]
    }
}

fn slopes(xs: &[f64], ys: &[f64]) -> Vec<f64> {
    let widths: Vec<f64> = xs.windows(2).map(|x| x[1] - x[0]).collect();
    let secants: Vec<f64> = ys
        .windows(2)
        .zip(&widths)
        .map(|(y, h)| (y[1] - y[0]) / h)
        .collect();
    let count = secants.len();
    let mut slopes = vec![0.0; xs.len()];
    for i in 1..count {
        let (left, right) = (secants[i - 1], secants[i]);
        if left > 0.0 && right > 0.0 {
            let (a, b) = (
                2.0 * widths[i] + widths[i - 1],
                widths[i] + 2.0 * widths[i - 1],
            );
            slopes[i] = (a + b) / (a / left + b / right);
        }
    }
    if count == 1 {
        return vec![secants[0]; 2];
    }
    slopes[0] = end(widths[0], widths[1], secants[0], secants[1]);
    slopes[count] = end(
        widths[count - 1],
        widths[count - 2],
        secants[count - 1],
        secants[count - 2],
    );
    slopes
}

/// The three-point slope at an end, limited so that the curve is monotone.
fn end(h0: f64, h1: f64, d0: f64, d1: f64) -> f64 {
    let slope = ((2.0 * h0 + h1) * d0 - h0 * d1) / (h0 + h1);
    slope.clamp(0.0, 3.0 * d0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_straight_line_stays_one() {
        let curve = Curve::through(&[(1.0, 3.0), (2.0, 5.0), (10.0, 21.0)]);
        for x in [0.0, 0.5, 1.0, 1.7, 2.0, 6.0, 10.0, 50.0] {
            assert!((curve.at(x) - (1.0 + 2.0 * x)).abs() < 1e-9, "{x}");
        }
    }

    #[test]
    fn one_point_is_a_rate() {
        let curve = Curve::through(&[(100.0, 2.0)]);
        assert_eq!([curve.at(50.0), curve.at(200.0)], [1.0, 4.0]);
    }

    proptest! {
        #[test]
        fn it_passes_through_its_points_and_never_falls(
            steps in prop::collection::vec((0.1f64..100.0, 0.0f64..50.0), 1..8),
            first in 0.1f64..10.0,
        ) {
            let mut points = vec![(first, first)];
            for (dx, dy) in steps {
                let (x, y) = points[points.len() - 1];
                points.push((x + dx, y + dy));
            }
            let curve = Curve::through(&points);
            for (x, y) in &points {
                prop_assert!((curve.at(*x) - y).abs() <= 1e-9 * y.max(1.0));
            }
            let far = points[points.len() - 1].0 * 1.5;
            let mut before = curve.at(0.0);
            prop_assert!(before >= -1e-12);
            for i in 1..=400 {
                let y = curve.at(far * f64::from(i) / 400.0);
                prop_assert!(y >= before - 1e-9 * before.max(1.0), "falls at {i}");
                before = y;
            }
        }
    }
}
