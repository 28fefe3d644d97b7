//! The cases of latent attention: widths, formats, block sizes, lengths.

use super::mla::{Shape, Span, append, attend, borders, properties, shared};
use crate::backend::Segments;
use crate::checkpoint::Format;
use crate::config::Dtype;
use crate::conformance::oracle::Attention;
use crate::conformance::{Case, Tolerance};

/// Number of heads, width of the latent, and the widths of a head's parts: `nope`, `rope`, value.
const fn attention([heads, latent, nope, rope, value]: [usize; 5]) -> Attention {
    Attention {
        heads,
        latent,
        nope,
        rope,
        value,
    }
}

const PUBLISHED: Attention = attention([2, 512, 128, 64, 128]);

const ODD: Attention = attention([3, 36, 20, 4, 33]);

/// Rows of the expansion at multiples of 16 bytes, as in the published model, and fewer than a block reads at a time.
const EVEN: Attention = attention([3, 72, 40, 16, 100]);

const EIGHTS: Attention = attention([2, 40, 16, 8, 24]);

const UNEVEN: Attention = attention([1, 33, 7, 5, 11]);

const ODD_ROWS: Attention = attention([2, 33, 9, 4, 10]);

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// All of them.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = append_cases();
    for (operation, prefill) in [("mla_prefill", true), ("mla_decode", false)] {
        let mut attention = Attentions {
            operation,
            prefill,
            cases: &mut cases,
        };
        attention.widths();
        attention.formats();
        attention.segments();
        attention.heads();
        attention.lengths();
        attention.properties();
        attention.dtypes();
    }
    cases
}

/// The case that others are variations of: bf16, blocks of 16 tokens, odd widths.
const BASE: Shape = Shape {
    attention: ODD,
    block_tokens: 16,
    format: Format::BF16,
    cache: None,
    size: 1.0,
};

/// The cases of one of the two attentions.
struct Attentions<'a> {
    operation: &'static str,
    prefill: bool,
    cases: &'a mut Vec<Case>,
}

impl Attentions<'_> {
    /// Attention over spans of a context and new tokens.
    fn attend(
        &mut self,
        name: impl AsRef<str>,
        shape: Shape,
        segments: Segments,
        spans: &'static [Span],
        sharp: f32,
    ) {
        let form = (self.prefill, segments);
        self.cases.push(Case::new(
            self.operation,
            name,
            Tolerance::Close,
            move |ctx| attend(ctx, shape, form, spans, sharp),
        ));
    }

    fn widths(&mut self) {
        const SPANS: [(&str, &[Span]); 3] = [
            (
                "ragged prompts",
                &[(0, 1), (5, 33), (3, 0), (64, 20), (17, 7)],
            ),
            (
                "single tokens",
                &[(0, 1), (15, 1), (16, 1), (100, 1), (63, 1), (64, 1)],
            ),
            ("one prompt", &[(0, 65)]),
        ];
        for (name, attention, block_tokens, format) in [
            ("2 heads of 128+64 over 512", PUBLISHED, 16, Format::BF16),
            ("3 heads of 20+4 over 36", ODD, 16, Format::F16),
            ("3 heads of 20+4 over 36", ODD, 4, Format::F32),
            ("1 head of 7+5 over 33", UNEVEN, 5, Format::BF16),
        ] {
            let shape = Shape {
                attention,
                block_tokens,
                format,
                ..BASE
            };
            for (spans_name, spans) in SPANS {
                // Scores of several tens; at hundreds f32's own rounding of a score would exceed the bound.
                for sharp in [1.0, 8.0] {
                    let name = format!(
                        "{format}/{name}/blocks of {block_tokens}/{spans_name}/sharp={sharp}"
                    );
                    self.attend(name, shape, Segments::All, spans, sharp);
                }
            }
        }
    }

    /// Weights of other formats with aligned rows.
    fn formats(&mut self) {
        for format in [Format::F16, Format::F32] {
            let shape = Shape {
                attention: EIGHTS,
                format,
                ..BASE
            };
            let name = format!("{format}/latents of whole eights");
            self.attend(name, shape, Segments::All, &[(5, 33), (20, 1)], 1.0);
        }
    }

    fn segments(&mut self) {
        for (name, segments) in [("single", Segments::Single), ("several", Segments::Several)] {
            let name = format!("only the {name}");
            let spans = &[(9, 1), (5, 33), (3, 0), (64, 1), (17, 2)];
            self.attend(name, BASE, segments, spans, 2.0);
        }
    }

    fn heads(&mut self) {
        let with = |heads, attention| Shape {
            attention: Attention { heads, ..attention },
            ..BASE
        };
        // More heads than one workgroup processes, and not a multiple of that number.
        let many = with(41, ODD);
        self.attend("41 heads", many, Segments::All, &[(70, 1), (5, 20)], 2.0);
        // A number of heads of the published widths that needs a second tile of rows.
        let twenty = with(20, PUBLISHED);
        let name = "20 heads of 128+64 over 512";
        self.attend(name, twenty, Segments::All, &[(70, 1)], 8.0);
    }

    fn lengths(&mut self) {
        let spans = &[(1000, 1), (700, 3)];
        self.attend("a long context", BASE, Segments::All, spans, 3.0);
        // A decode may divide a context among several workgroups.
        for (widths, attention) in [("", ODD), (", even widths", EVEN)] {
            let shape = Shape { attention, ..BASE };
            let name = format!("single tokens after a long context{widths}");
            let spans = &[(1000, 1), (3, 1), (1100, 1)];
            self.attend(name, shape, Segments::Single, spans, 3.0);
        }
        // More queries than one workgroup processes.
        let narrow = Shape {
            attention: UNEVEN,
            ..BASE
        };
        let name = "a prompt of 300 tokens";
        self.attend(name, narrow, Segments::All, &[(20, 300)], 2.0);
        // Beyond the range of f16.
        let large = Shape { size: 1e8, ..BASE };
        self.attend(
            "large keys",
            large,
            Segments::All,
            &[(3, 20), (70, 1)],
            2e-8,
        );
    }

    /// Pools of each dtype: rows of multiples of eight, rows of an odd number of elements, the published widths.
    fn dtypes(&mut self) {
        for cache in DTYPES {
            for attention in [EVEN, ODD_ROWS, PUBLISHED] {
                let Attention { latent, rope, .. } = attention;
                let shape = Shape {
                    attention,
                    cache: Some(cache),
                    ..BASE
                };
                let name = format!("a {cache} pool of {latent}+{rope}");
                let ragged = &[(5, 33), (3, 0), (64, 20), (20, 1)];
                self.attend(&name, shape, Segments::All, ragged, 2.0);
                let name = format!("{name}/single tokens after a long context");
                let single = &[(1000, 1), (3, 1)];
                self.attend(name, shape, Segments::Single, single, 2.0);
            }
        }
    }

    fn properties(&mut self) {
        let form = (self.prefill, Segments::All);
        self.cases.push(Case::new(
            self.operation,
            "one prompt's blocks shared",
            Tolerance::Close,
            move |ctx| shared(ctx, BASE, form),
        ));
        self.cases.push(Case::new(
            self.operation,
            "alone, cut and again",
            Tolerance::Split,
            move |ctx| properties(ctx, BASE, form),
        ));
    }
}

fn append_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let spans: [&[Span]; 2] = [
        &[(0, 1), (5, 33), (3, 0), (64, 20), (15, 1), (16, 1)],
        &[(0, 65)],
    ];
    for shape in [[512, 64, 16], [36, 4, 4], [33, 7, 5], [20, 12, 1]] {
        let [latent, rope, block] = shape;
        for (i, spans) in spans.into_iter().enumerate() {
            // Latents as small as the epsilon, so that a wrong epsilon is noticed.
            for scale in [1.0, 1e-3] {
                let what = ["ragged", "one prompt"][i];
                let name = format!("{latent}+{rope}/blocks of {block}/{what}/scale={scale:e}");
                cases.push(Case::new(
                    "mla_append",
                    name,
                    Tolerance::Close,
                    move |ctx| append(ctx, shape, None, spans, scale, 1e-6),
                ));
            }
        }
    }
    for dtype in DTYPES {
        for shape in [[72, 16, 16], [33, 4, 5]] {
            let [latent, rope, block] = shape;
            cases.push(Case::new(
                "mla_append",
                format!("a {dtype} pool of {latent}+{rope}/blocks of {block}"),
                Tolerance::Close,
                move |ctx| append(ctx, shape, Some(dtype), spans[0], 1.0, 1e-6),
            ));
        }
        cases.push(Case::new(
            "mla_append",
            format!("a {dtype} pool/numbers at its borders"),
            Tolerance::Close,
            move |ctx| borders(ctx, dtype),
        ));
    }
    cases
}
