//! Superblocks of formats without vector code here: decoded element by element first, into the byte order that the vector
//! code reads.

use super::super::isa::Isa;
use super::super::{BLOCK, BLOCKS, GROUP, SUPERBLOCK};
use super::{Codes, Format, Unpacked, eight};
use crate::checkpoint::{self, BlockFormat, Unpack};

/// 256 columns: signed codes, then two steps of eight f32 scales, then the same of minimums.
const BYTES: usize = size_of::<Superblock>();

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Superblock {
    codes: [[i8; BLOCK]; BLOCKS],
    scales: [[f32; 8]; 2],
    mins: [[f32; 8]; 2],
}

/// Groups of 16 or 32 columns, with or without minimums.
#[derive(Clone, Copy)]
pub(in super::super) struct Plain<const HALVES: bool, const MINS: bool>;

impl<const HALVES: bool, const MINS: bool> Format<BYTES> for Plain<HALVES, MINS> {
    const CODES: Codes = Codes::Signed;
    const HALVES: bool = HALVES;
    const MINS: bool = MINS;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; BYTES]) -> Unpacked<I> {
        let block: Superblock = bytemuck::pod_read_unaligned(bytes);
        Unpacked {
            codes: eight(
                #[inline(always)]
                |b| isa.signed_bytes(&block.codes[b]),
            ),
            scales: [isa.load(&block.scales[0]), isa.load(&block.scales[1])],
            mins: [isa.load(&block.mins[0]), isa.load(&block.mins[1])],
        }
    }
}

/// A stored row of `format`, converted to the form that [`Plain`] reads, superblock by superblock.
pub(in super::super) fn plain(format: &BlockFormat, bytes: &[u8]) -> Vec<u8> {
    let mut row = Vec::new();
    let Unpack::Codes(unpack) = format.unpack else {
        return row;
    };
    let mut block = checkpoint::Codes::default();
    for blocks in bytes.chunks(SUPERBLOCK / format.length * format.bytes) {
        let mut to: Superblock = bytemuck::Zeroable::zeroed();
        for (i, bytes) in blocks.chunks_exact(format.bytes).enumerate() {
            unpack(bytes, &mut block);
            let first = i * format.length;
            let codes = to.codes.as_flattened_mut();
            codes[first..first + format.length].copy_from_slice(&block.codes[..format.length]);
            for g in 0..format.length / GROUP {
                let (at, from) = (first / GROUP + g, g * GROUP / format.group);
                let (b, h) = (at / 2, at % 2);
                let [step, lane] = if format.group == GROUP {
                    [b / 4, b % 4 + 4 * h]
                } else {
                    [0, b]
                };
                to.scales[step][lane] = block.scales[from];
                to.mins[step][lane] = block.mins[from];
            }
        }
        row.extend_from_slice(bytemuck::bytes_of(&to));
    }
    row
}
