//! A batch as kernels see it: one list of words, written once a submission. Twin of `shaders/shared/batch.wgsl` and of
//! `kernels/shared/batch.h`.
//!
//! It also holds the counts that grids are sized by. What a batch may hold was checked before.

use crate::backend::{Batch, Capacity, Rows, Segment};

/// Words of the header.
const HEADER: usize = 25;
/// No slot, no target.
const NONE: u32 = u32::MAX;
/// Tokens a chunk of the recurrence.
const CHUNK: usize = 16;
/// Spans are whole runs of so many positions, as kernels take them.
const SPAN_STEP: usize = 32;
/// A split of a segment that is scanned in several at once has at least so many chunks ..
const SPLIT_CHUNKS: usize = 24;
/// .. and fewer splits than these take longer than the segment in one.
const FEWEST_SPLITS: usize = 4;
/// More than these gain nothing: their entry states are found one after the other.
pub(crate) const MOST_SPLITS: usize = 8;
/// Queries a tile of a prefill.
pub(crate) const QUERIES: usize = 16;

/// Which word of the header counts a tensor's rows.
pub(crate) fn count_word(rows: Rows) -> u32 {
    match rows {
        Rows::Tokens => 0,
        Rows::Outputs => 2,
    }
}

/// Positions that a prefill expands together, and what it has to do with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Positions in it.
    pub(crate) positions: usize,
    /// Tiles of queries of its segment.
    pub(crate) tiles: usize,
}

/// The words, and what the host keeps of them.
#[derive(Debug, Default)]
pub(crate) struct BatchMetadata {
    pub(crate) words: Vec<u32>,
    pub(crate) tokens: usize,
    pub(crate) segments: usize,
    pub(crate) outputs: usize,
    /// Positions up to the end of the segment that reaches furthest.
    pub(crate) reached: usize,
    /// Rows of segments of several tokens.
    pub(crate) several_rows: usize,
    /// Segments of one token or none.
    pub(crate) short_segments: usize,
    /// Chunks of segments of several tokens, and of all.
    pub(crate) several_chunks: usize,
    pub(crate) chunks: usize,
    /// Runs of chunks that are scanned one after the other: of segments of several tokens, and of all.
    pub(crate) several_scans: usize,
    pub(crate) scans: usize,
    /// Those that are a split of a segment, and segments that are cut into splits.
    pub(crate) splits: usize,
    pub(crate) cuts: usize,
    /// Tiles of queries of segments of several tokens, and of all, where the step attends to latents.
    pub(crate) several_tiles: usize,
    pub(crate) tiles: usize,
    /// Windows of segments of several tokens come first, then those of others.
    pub(crate) windows: Vec<Window>,
    pub(crate) several_windows: usize,
    /// Spans of single rows.
    pub(crate) spans: usize,
}

/// What the metadata depends on beside the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MetadataLayout {
    /// Positions a window.
    pub(crate) window: usize,
    /// Positions a span at least.
    pub(crate) span: usize,
    /// Spans of a row at most; those of a longer one are longer.
    pub(crate) most_spans: usize,
    /// Tokens a block of the latent pool, or 1 where there is none.
    pub(crate) block_tokens: usize,
}

impl MetadataLayout {
    /// Chunks of a batch within `capacity`: each segment and each checkpoint may leave one partly filled.
    pub(crate) fn chunks(capacity: &Capacity) -> usize {
        capacity.tokens / CHUNK + capacity.segments + capacity.checkpoints
    }

    /// Splits of a batch within `capacity` where a segment has at most `most`.
    pub(crate) fn splits(capacity: &Capacity, most: usize) -> usize {
        let chunks = Self::chunks(capacity);
        if splits(chunks, most) > 1 {
            chunks / SPLIT_CHUNKS
        } else {
            0
        }
    }

    /// Spans of single rows of a batch within `capacity`: every row may leave one partly filled.
    pub(crate) fn spans(&self, capacity: &Capacity) -> usize {
        let positions = capacity.blocks * self.block_tokens;
        let most = capacity.segments.saturating_mul(self.most_spans);
        most.min(positions / self.span + capacity.segments)
    }

    /// Positions a span of a row that attends to so many. It depends on nothing else, and so does the row's arithmetic.
    fn span(&self, positions: usize) -> usize {
        let share = positions.div_ceil(self.most_spans);
        self.span.max(share.next_multiple_of(SPAN_STEP))
    }

    /// The most words that an metadata within `capacity` takes.
    pub(crate) fn words(&self, capacity: &Capacity) -> usize {
        let tiles = capacity.tokens / QUERIES + capacity.segments;
        let windows = capacity.blocks * self.block_tokens / self.window + capacity.segments;
        let splits = Self::splits(capacity, MOST_SPLITS);
        HEADER
            + 3 * capacity.tokens
            + 10 * capacity.segments
            + 2 * capacity.outputs
            + capacity.blocks
            + 2 * capacity.checkpoints
            + 4 * Self::chunks(capacity)
            + 4 * (capacity.segments + splits)
            + 3 * splits
            + 2 * tiles
            + 4 * windows
            + 2 * self.spans(capacity)
            + 2 * capacity.segments
    }

    /// Lays a batch out; windows and tiles only where the step attends to latents. A long segment is cut into at most
    /// `splits`, which are scanned at once.
    pub(crate) fn metadata(&self, batch: &Batch, attends: bool, splits: usize) -> BatchMetadata {
        let starts: Vec<usize> = batch.starts().collect();
        let several = |segment: &Segment| segment.length > 1;
        // Segments of several tokens first, then the others.
        let (first, second): (Vec<usize>, Vec<usize>) =
            (0..batch.segments.len()).partition(|i| several(&batch.segments[*i]));
        let order: Vec<usize> = first.into_iter().chain(second).collect();
        let mut metadata = BatchMetadata {
            words: vec![0; HEADER],
            tokens: batch.tokens.len(),
            segments: batch.segments.len(),
            outputs: batch.outputs.len(),
            reached: batch
                .segments
                .iter()
                .map(|segment| segment.position + segment.length)
                .max()
                .unwrap_or_default(),
            short_segments: batch
                .segments
                .iter()
                .filter(|segment| !several(segment))
                .count(),
            ..BatchMetadata::default()
        };
        metadata.words[0] = word(metadata.tokens);
        metadata.words[1] = word(metadata.segments);
        metadata.words[2] = word(metadata.outputs);
        metadata.list(3, batch.tokens.iter().copied());
        let owners = batch
            .segments
            .iter()
            .enumerate()
            .flat_map(|(i, segment)| std::iter::repeat_n(word(i), segment.length));
        metadata.list(4, owners);
        metadata.outputs(batch);
        metadata.rows(batch, &starts, &order);
        let segments = metadata.segments(batch, &starts);
        metadata.chunks(batch, &starts, &order, segments);
        metadata.scans(batch, segments, splits);
        if attends {
            self.windows(&mut metadata, batch, &order);
            self.spanned(&mut metadata, batch);
        }
        metadata
    }

    /// Tiles of queries and windows of positions.
    fn windows(&self, metadata: &mut BatchMetadata, batch: &Batch, order: &[usize]) {
        let (mut tiles, mut windows) = (Vec::new(), Vec::new());
        for i in order {
            let segment = &batch.segments[*i];
            if segment.length == 0 {
                continue;
            }
            let first_tile = tiles.len() / 2;
            for first in (0..segment.length).step_by(QUERIES) {
                tiles.extend([word(*i), word(first)]);
            }
            let count = tiles.len() / 2 - first_tile;
            let end = segment.position + segment.length;
            for first in (0..end).step_by(self.window) {
                let positions = self.window.min(end - first);
                windows.extend([word(*i), word(first), word(positions), word(first_tile)]);
                metadata.windows.push(Window {
                    positions,
                    tiles: count,
                });
            }
            if segment.length > 1 {
                metadata.several_windows = metadata.windows.len();
                metadata.several_tiles = tiles.len() / 2;
            }
        }
        metadata.tiles = tiles.len() / 2;
        metadata.words[16] = word(metadata.several_tiles);
        metadata.words[17] = word(metadata.tiles);
        metadata.list(9, tiles);
        metadata.list(10, windows);
    }
}

impl MetadataLayout {
    /// Spans of the single rows, in the order of those rows.
    fn spanned(&self, metadata: &mut BatchMetadata, batch: &Batch) {
        let (mut spans, mut spanned) = (Vec::new(), Vec::new());
        for segment in batch.segments.iter().filter(|segment| segment.length == 1) {
            let number = spanned.len() / 2;
            let first = spans.len() / 2;
            for position in (0..=segment.position).step_by(self.span(segment.position + 1)) {
                spans.extend([word(number), word(position)]);
            }
            spanned.extend([word(first), word(spans.len() / 2 - first)]);
        }
        metadata.spans = spans.len() / 2;
        metadata.words[18] = word(metadata.spans);
        metadata.list(12, spans);
        metadata.list(13, spanned);
    }
}

/// Into how many splits a segment of so many chunks is cut, of at most `most`. It follows from the segment and the layout
/// alone, so that arithmetic does not depend on what else is in the batch (`docs/performance/hopper.md`).
fn splits(chunks: usize, most: usize) -> usize {
    let count = most.min(chunks / SPLIT_CHUNKS);
    if count < FEWEST_SPLITS { 1 } else { count }
}

/// Counts fit a word: batches were checked against capacities, and capacities against buffers.
fn word(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(NONE)
}

impl BatchMetadata {
    /// How many rows of this kind there are.
    pub(crate) fn count(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens,
            Rows::Outputs => self.outputs,
        }
    }

    /// How many rows of this kind stand alone: of single tokens, or of outputs.
    pub(crate) fn few(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens - self.several_rows,
            Rows::Outputs => self.outputs,
        }
    }

    /// Which word counts the positions of a window.
    pub(crate) fn window_word(&self, number: usize) -> u32 {
        self.words[10] + 4 * word(number) + 2
    }

    /// Appends a list and notes in the header where it begins.
    fn list(&mut self, header: usize, words: impl IntoIterator<Item = u32>) -> usize {
        let at = self.words.len();
        self.words[header] = word(at);
        self.words.extend(words);
        at
    }

    fn outputs(&mut self, batch: &Batch) {
        let outputs = batch.outputs.iter();
        self.list(
            6,
            outputs.flat_map(|output| [word(output.row), output.target.unwrap_or(NONE)]),
        );
    }

    fn rows(&mut self, batch: &Batch, starts: &[usize], order: &[usize]) {
        let rows = order
            .iter()
            .flat_map(|i| starts[*i]..starts[*i] + batch.segments[*i].length);
        self.list(7, rows.map(word));
        let several = batch.segments.iter().filter(|segment| segment.length > 1);
        self.several_rows = several.map(|segment| segment.length).sum();
        self.words[11] = word(self.several_rows);
    }

    /// The segments, with their block tables and checkpoints behind them; their chunks are filled in later.
    fn segments(&mut self, batch: &Batch, starts: &[usize]) -> usize {
        let at = self.list(5, std::iter::repeat_n(0, 10 * batch.segments.len()));
        for (i, segment) in batch.segments.iter().enumerate() {
            let blocks = self.words.len();
            self.words
                .extend(segment.blocks.iter().map(|block| block.0));
            let checkpoints = self.words.len();
            for checkpoint in &segment.checkpoints {
                self.words
                    .extend([word(checkpoint.after), checkpoint.slot.0]);
            }
            let words = [
                word(starts[i]),
                word(segment.length),
                word(segment.position),
                segment.slot_in.map_or(NONE, |slot| slot.0),
                segment.slot_out.0,
                word(blocks),
                word(checkpoints),
                word(segment.checkpoints.len()),
            ];
            self.words[at + 10 * i..at + 10 * i + 8].copy_from_slice(&words);
        }
        at
    }

    /// Chunks of the recurrence; they start anew at each checkpoint.
    fn chunks(&mut self, batch: &Batch, starts: &[usize], order: &[usize], segments: usize) {
        let mut chunks = Vec::new();
        for i in order {
            let segment = &batch.segments[*i];
            self.words[segments + 10 * i + 8] = word(chunks.len() / 4);
            let mut first = 0;
            let ends = segment
                .checkpoints
                .iter()
                .map(|checkpoint| (checkpoint.after, checkpoint.slot.0));
            for (end, slot) in ends.chain([(segment.length, NONE)]) {
                while first < end {
                    let last = end.min(first + CHUNK);
                    let kept = if last == end { slot } else { NONE };
                    chunks.extend([word(starts[*i] + first), word(last - first), word(*i), kept]);
                    first = last;
                }
            }
            self.words[segments + 10 * i + 9] =
                word(chunks.len() / 4) - self.words[segments + 10 * i + 8];
            if segment.length > 1 {
                self.several_chunks = chunks.len() / 4;
            }
        }
        self.chunks = chunks.len() / 4;
        self.words[14] = word(self.several_chunks);
        self.words[15] = word(self.chunks);
        self.list(8, chunks);
    }
    /// Runs of chunks that are scanned one after the other: splits first, then whole segments, the longest first, then
    /// segments of single tokens.
    fn scans(&mut self, batch: &Batch, segments: usize, most: usize) {
        let (mut scans, mut cuts) = (Vec::new(), Vec::new());
        for (i, segment) in batch.segments.iter().enumerate() {
            let [first, count] = [8, 9].map(|field| self.words[segments + 10 * i + field]);
            let parts = splits(count as usize, most);
            let border = |part: usize| word(count as usize * part / parts);
            if parts > 1 {
                cuts.extend([word(i), word(self.splits), word(parts)]);
            }
            for part in 0..parts {
                let number = if parts > 1 {
                    self.splits += 1;
                    word(self.splits - 1)
                } else {
                    NONE
                };
                let chunks = border(part + 1) - border(part);
                let scan = [word(i), first + border(part), chunks, number];
                scans.push((segment.length > 1, scan));
            }
        }
        scans.sort_by_key(|(several, [_, _, chunks, number])| {
            (*number == NONE, !several, std::cmp::Reverse(*chunks))
        });
        self.cuts = cuts.len() / 3;
        self.scans = scans.len();
        self.several_scans = scans.iter().filter(|(several, _)| *several).count();
        self.words[21] = word(self.scans);
        self.words[22] = word(self.several_scans);
        self.words[23] = word(self.splits);
        self.words[24] = word(self.cuts);
        self.list(19, scans.into_iter().flat_map(|(_, scan)| scan));
        self.list(20, cuts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Block, Slot};

    /// A batch of single tokens after so many others each.
    fn batch(positions: &[usize]) -> Batch {
        let segment = |position: &usize| Segment {
            length: 1,
            position: *position,
            slot_in: None,
            slot_out: Slot(0),
            checkpoints: Vec::new(),
            blocks: vec![Block(0); position / 64 + 1],
        };
        Batch {
            tokens: vec![0; positions.len()],
            segments: positions.iter().map(segment).collect(),
            outputs: Vec::new(),
        }
    }

    /// Where the spans of each row begin.
    fn spans(layout: &MetadataLayout, positions: &[usize]) -> Vec<Vec<u32>> {
        let metadata = layout.metadata(&batch(positions), true, 1);
        let (spans, spanned) = (metadata.words[12] as usize, metadata.words[13] as usize);
        (0..positions.len())
            .map(|row| {
                let words = &metadata.words[spanned + 2 * row..][..2];
                (words[0]..words[0] + words[1])
                    .map(|span| {
                        let words = &metadata.words[spans + 2 * span as usize..][..2];
                        assert_eq!(words[0], row as u32);
                        words[1]
                    })
                    .collect()
            })
            .collect()
    }

    #[test]
    fn spans_follow_from_the_position_alone_and_are_no_more_than_their_most() {
        let layout = MetadataLayout {
            window: 4096,
            span: 256,
            most_spans: 132,
            block_tokens: 64,
        };
        let positions = [0, 255, 256, 4095, 33_791, 33_792, 131_071, 1_048_575];
        let together = spans(&layout, &positions);
        for (row, position) in together.iter().zip(positions) {
            assert_eq!(spans(&layout, &[position]), std::slice::from_ref(row));
            assert!(row.len() <= 132, "{position}: {}", row.len());
            let span = row.get(1).copied().unwrap_or(256);
            assert!(span >= 256 && span % 32 == 0, "{position}: {span}");
            let starts: Vec<u32> = (0..=position as u32).step_by(span as usize).collect();
            assert_eq!(*row, starts, "{position}");
        }
        assert_eq!(together[3].len(), 16);
        assert_eq!(together[6].len(), 128);
        let capacity = Capacity {
            tokens: positions.len(),
            segments: positions.len(),
            outputs: 0,
            blocks: batch(&positions)
                .segments
                .iter()
                .map(|segment| segment.blocks.len())
                .sum(),
            checkpoints: 0,
        };
        let metadata = layout.metadata(&batch(&positions), true, 1);
        assert!(metadata.spans <= layout.spans(&capacity));
        assert!(metadata.words.len() <= layout.words(&capacity));
    }
}
