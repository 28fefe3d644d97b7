//! Drawn answers of a model through the parser of tool calls.

use kimi_linear::tokenizer::{ToolCallEvent, ToolCallParser};
use proptest::prelude::*;

use super::tokenizer;
use super::values::text;
use crate::seeds::properties;

properties! { answers, 400,
    #[test]
    fn drawn_answers_are_parsed_without_loss(
        pieces in prop::collection::vec(prop_oneof![
            prop::sample::select(vec![
                "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
                "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|im_end|>",
            ]).prop_map(|name| (true, name.to_owned())),
            text().prop_map(|text| (false, text)),
        ], 0..24),
    ) {
        let tokenizer = tokenizer();
        let (mut parser, mut decoder) = (ToolCallParser::default(), tokenizer.stream());
        let mut ids = Vec::new();
        for (control, piece) in &pieces {
            match control {
                true => ids.extend(tokenizer.special_id(piece)),
                false => ids.extend(tokenizer.encode_ordinary(piece).unwrap()),
            }
        }
        let mut events = Vec::new();
        for id in &ids {
            events.extend(parser.push(&decoder.push(*id).unwrap()));
        }
        events.extend(parser.finish(&decoder.finish()));
        // Calls begin in order, and each ends once, after its arguments.
        let (mut begun, mut open) = (0, None);
        for event in &events {
            match event {
                ToolCallEvent::CallBegin { index, .. } => {
                    prop_assert_eq!((*index, open), (begun, None));
                    (begun, open) = (begun + 1, Some(*index));
                }
                ToolCallEvent::ArgumentsDelta { index, .. } => prop_assert_eq!(Some(*index), open),
                ToolCallEvent::CallEnd { index, .. } => {
                    prop_assert_eq!(Some(*index), open);
                    open = None;
                }
                ToolCallEvent::Text(_) => prop_assert_eq!(open, None),
            }
        }
        prop_assert_eq!(open, None);
        // Without a section all text is text, whatever it spells.
        if !ids.contains(&tokenizer.special_id("<|tool_calls_section_begin|>").unwrap())
            && !ids.contains(&tokenizer.special_id("<|tool_call_begin|>").unwrap())
        {
            prop_assert_eq!(begun, 0);
        }
    }
}
