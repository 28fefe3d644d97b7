//! The numbers that Rust, WGSL and CUDA share, defined once: the words of a batch, the ids of weight formats and of a
//! recurrence's forms.
//!
//! `shaders/shared/layout.wgsl` and `kernels/shared/layout.h` are generated from here (`KIMI_BLESS=1 cargo test --lib layout`);
//! a test compares them.

use bytemuck::{Pod, Zeroable};

use crate::backend::Form;

/// Names and descriptions of consecutive words, as in the generated files.
#[cfg(test)]
struct Words {
    /// The prefix of each name in the kernels.
    prefix: &'static str,
    /// The name of their number in the kernels.
    count: &'static str,
    about: &'static str,
    words: &'static [(&'static str, &'static str)],
}

/// Defines the words of the batch's header by name.
macro_rules! header {
    ($($word:ident = $meaning:literal),* $(,)?) => {
        /// A word of the batch's header.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(in crate::backend) enum Header {
            $(#[doc = concat!("`", $meaning, "`")] $word),*
        }

        impl Header {
            /// Number of words of the header.
            pub(in crate::backend) const WORDS: usize = [$(Self::$word),*].len();
        }

        #[cfg(test)]
        const HEADER: Words = Words {
            prefix: "",
            count: "Header",
            about: "Words of the batch's header.",
            words: &[$((stringify!($word), $meaning)),*],
        };
    };
}

/// Defines a record of the batch's lists, `[n, fields]`: its struct on the host, and the names of its words in the kernels.
macro_rules! record {
    ($prefix:literal, $count:literal, $name:ident, $about:literal, { $($field:ident = $meaning:literal),* $(,)? }) => {
        #[doc = $about]
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
        pub(in crate::backend) struct $name {
            $(#[doc = $meaning] pub(in crate::backend) $field: u32),*
        }

        impl $name {
            /// Number of words of a record.
            pub(in crate::backend) const WORDS: usize = size_of::<Self>() / 4;
            #[cfg(test)]
            const NAMES: Words = Words {
                prefix: $prefix,
                count: $count,
                about: $about,
                words: &[$((stringify!($field), $meaning)),*],
            };
        }
    };
}

header! {
    Tokens = "tokens of all segments",
    Segments = "segments",
    Outputs = "output rows",
    AtTokens = "[T]: token ids, or FED with the number of a draw",
    AtOwners = "[T]: the segment of each token",
    AtSegments = "[segments, SEGMENT]: followed by block tables and checkpoints",
    AtOutputs = "[outputs, OUTPUT_WORDS]",
    AtRows = "[T]: rows of segments of several tokens, then those of single tokens",
    AtChunks = "[chunks, CHUNK_WORDS]",
    AtTiles = "[tiles, TILE_WORDS]",
    AtWindows = "[windows, WINDOW_WORDS]",
    SeveralRows = "rows of segments of several tokens",
    AtSpans = "[spans, SPAN_WORDS]",
    AtSpanned = "[single rows, SPANNED_WORDS]",
    SeveralChunks = "chunks of segments of several tokens",
    ChunkTotal = "chunks of all segments",
    SeveralTiles = "tiles of segments of several tokens",
    TileTotal = "tiles of all segments",
    SpanTotal = "spans",
    AtScans = "[scans, SCAN_WORDS]: splits first, then the longest first, then segments of single tokens",
    AtCuts = "[cuts, CUT_WORDS]",
    ScanTotal = "scans of all segments",
    SeveralScans = "scans of segments of several tokens",
    SplitTotal = "splits",
    CutTotal = "segments that are cut into splits",
    Draws = "draws",
    AtDraws = "[draws, DRAW_WORDS]: followed by the lists of allowed tokens and of changes",
}

record!("", "Segment", SegmentWords, "A segment.", {
    start = "its first row",
    length = "tokens; 0 copies the state",
    position = "tokens of the sequence before the segment",
    slot_in = "the slot with its initial state, or NONE for zeros",
    slot_out = "the slot that its state is written to",
    blocks = "offset of its block table in the batch",
    checkpoints = "offset of its checkpoints in the batch: [n, CHECKPOINT_WORDS]",
    checkpoint_count = "checkpoints",
    chunks = "its first chunk",
    chunk_count = "chunks",
});

record!("Checkpoint", "CheckpointWords", CheckpointWords, "A checkpoint of a segment's state.", {
    after = "tokens of the segment before it",
    slot = "the slot that the state is written to",
});

record!("Output", "OutputWords", OutputWords, "An output row.", {
    row = "its row",
    target = "the token whose logit is requested, or NONE",
});

record!("Chunk", "ChunkWords", ChunkWords, "A chunk of the recurrence.", {
    row = "its first row",
    length = "tokens, at most 16",
    segment = "its segment",
    slot = "slot of the checkpoint at its end, or NONE",
});

record!("Tile", "TileWords", TileWords, "A tile of queries of a prefill.", {
    segment = "its segment",
    first = "its first token of the segment, a multiple of 16",
});

record!("Window", "WindowWords", WindowWords, "Positions that a prefill expands together.", {
    segment = "their segment",
    first = "the first of them",
    positions = "number of positions",
    tile = "the first tile of the segment",
});

record!("Span", "SpanWords", SpanWords, "Positions that a decode attends to separately from others.", {
    row = "number of the single row",
    first = "the first position",
});

record!("Spanned", "SpannedWords", SpannedWords, "A single row's spans.", {
    first = "the first span",
    count = "number of spans",
});

record!("Scan", "ScanWords", ScanWords, "Chunks that are scanned one after the other.", {
    segment = "their segment",
    chunk = "the first of them",
    chunks = "number of chunks",
    split = "number of the split, or NONE for a whole segment",
});

record!("Cut", "CutWords", CutWords, "A segment that is cut into splits.", {
    segment = "the segment",
    split = "number of its first split",
    splits = "number of splits",
});

record!("Draw", "DrawWords", DrawWords, "A draw of a token.", {
    row = "its output row",
    scale = "f32: 2^26 log2(e) / temperature, or 0 for the best token",
    top_k = "tokens kept, or 0",
    top_p = "share of the weights kept in units of 2^-32, or 0",
    least = "least weight kept",
    random = "random number in units of 2^-32",
    allowed = "offset of its bit mask of allowed tokens in the batch, or NONE",
    changes = "offset of its changes in the batch: [n, CHANGE_WORDS]",
    change_count = "changes",
    changed = "its row of changed logits, or NONE",
});

record!("Change", "ChangeWords", ChangeWords, "A change of a logit.", {
    token = "the token",
    positive = "f32: factor of a logit above 0",
    negative = "f32: factor of any other logit",
    add = "f32: added last",
});

/// No slot, no target, no split, no list.
pub(in crate::backend) const NONE: u32 = u32::MAX;

/// In place of a token id, with the number of the draw that has it: the token that the submission before drew.
pub(in crate::backend) const FED: u32 = 1 << 31;

/// How a recurrence runs over segments, in the order of its ids, with the names in the kernels.
const FORMS: [(Form, &str, &str); 3] = [
    (
        Form::Auto,
        "BY_LENGTH",
        "segments of several tokens by chunks, others by steps",
    ),
    (Form::Chunk, "ALL_CHUNKS", "all segments by chunks"),
    (Form::Step, "ALL_STEPS", "all segments by steps"),
];

/// The id of a recurrence's form in the kernels.
pub(in crate::backend) fn form_word(form: Form) -> u32 {
    let found = FORMS.iter().position(|(known, ..)| *known == form);
    found.unwrap_or_default() as u32
}

/// Checks that a file has this text, which was generated from `source`; `KIMI_BLESS=1` writes it.
#[cfg(test)]
pub(in crate::backend) fn hold(file: &str, text: &str, source: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("KIMI_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        found, text,
        "{file} differs from {source}; KIMI_BLESS=1 writes it again"
    );
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::checkpoint::FORMATS;

    const RECORDS: [Words; 13] = [
        HEADER,
        SegmentWords::NAMES,
        CheckpointWords::NAMES,
        OutputWords::NAMES,
        ChunkWords::NAMES,
        TileWords::NAMES,
        WindowWords::NAMES,
        SpanWords::NAMES,
        SpannedWords::NAMES,
        ScanWords::NAMES,
        CutWords::NAMES,
        DrawWords::NAMES,
        ChangeWords::NAMES,
    ];

    /// `AtTokens` and `slot_in` as they are written in the kernels: `AT_TOKENS`, `SLOT_IN`.
    fn constant(name: &str) -> String {
        let mut upper = String::new();
        for (i, letter) in name.char_indices() {
            if letter.is_uppercase() && i > 0 {
                upper.push('_');
            }
            upper.extend(letter.to_uppercase());
        }
        upper
    }

    /// All constants, each on a line formatted by `line`.
    fn text(line: impl Fn(&str, u32) -> String) -> String {
        let mut text = String::new();
        let mut put = |name: &str, value: u32, meaning: &str| {
            writeln!(text, "{:<44}// {meaning}", line(name, value)).unwrap();
        };
        put("NONE", NONE, "no slot, no target, no split, no list");
        put(
            "FED",
            FED,
            "the bit of a token id that is drawn, beside the number of the draw",
        );
        for (id, format) in FORMATS.iter().enumerate() {
            let name = format!("FORMAT_{format}");
            put(&name, id as u32, "the format of a weight's numbers");
        }
        for (word, (_, name, meaning)) in FORMS.iter().enumerate() {
            put(name, word as u32, meaning);
        }
        for record in RECORDS {
            for (i, (name, meaning)) in record.words.iter().enumerate() {
                let prefix = if record.prefix.is_empty() {
                    String::new()
                } else {
                    constant(record.prefix) + "_"
                };
                put(&(prefix + &constant(name)), i as u32, meaning);
            }
            put(
                &constant(record.count),
                record.words.len() as u32,
                record.about,
            );
        }
        text
    }

    #[test]
    fn shaders_and_kernels_have_the_layout_of_this_file() {
        let source = "src/backend/gpu/layout.rs";
        let from = format!("// Generated from `{source}`.\n\n");
        let wgsl = text(|name, value| format!("const {name}: u32 = {value}u;"));
        hold(
            "shaders/shared/layout.wgsl",
            &format!("{from}{wgsl}"),
            source,
        );
        let cuda = text(|name, value| format!("    {name} = {value}u,"));
        let cuda = format!("{from}#pragma once\n\nenum : u32 {{\n{cuda}}};\n");
        hold("kernels/shared/layout.h", &cuda, source);
    }

    #[test]
    fn no_two_words_have_one_name() {
        let mut names: Vec<String> = RECORDS
            .iter()
            .flat_map(|record| {
                let prefix = constant(record.prefix);
                record
                    .words
                    .iter()
                    .map(move |(name, _)| prefix.clone() + &constant(name))
            })
            .collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
