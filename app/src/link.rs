//! A link to a chat: the chat with its tokens and what the views show of it, as text that the part of an address after `#` may
//! hold. Browsers send that part to no server.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use kimi_linear::model::TraceHead;
use serde::{Deserialize, Serialize};

use crate::kept::KeptChat;
use crate::selection::Selection;

/// The start of the text.
const START: &str = "chat=";

/// Maximum length of the text in bytes: mail programs and chats cut longer links.
const MOST: usize = 32 << 10;

#[derive(Serialize, Deserialize)]
struct Link {
    chat: KeptChat,
    token: Option<usize>,
    /// Layer and head.
    kda: Option<[usize; 2]>,
    mla: Option<[usize; 2]>,
}

/// The text of a link.
///
/// # Errors
/// A chat that is too long for a link, in words.
pub fn encode(chat: KeptChat, selection: &Selection) -> Result<String, String> {
    let pair = |head: TraceHead| [head.layer, head.head];
    let link = Link {
        chat,
        token: selection.token,
        kda: selection.kda.map(pair),
        mla: selection.mla.map(pair),
    };
    let json = serde_json::to_vec(&link).map_err(|error| error.to_string())?;
    let text = format!("{START}{}", BASE64_URL_SAFE_NO_PAD.encode(json));
    if text.len() > MOST {
        return Err(format!(
            "This chat is too long for a link: it would have {} characters, and programs cut links of more than {MOST}. Save \
             it to a file instead.",
            text.len()
        ));
    }
    Ok(text)
}

/// The chat and the selection of a link; `None` if the text is no link.
///
/// # Errors
/// A link that was cut or changed, in words.
pub fn decode(text: &str) -> Option<Result<(KeptChat, Selection), String>> {
    let coded = text.strip_prefix(START)?;
    let read = || -> Result<Link, String> {
        let json = BASE64_URL_SAFE_NO_PAD.decode(coded);
        let json = json.map_err(|error| error.to_string())?;
        serde_json::from_slice(&json).map_err(|error| error.to_string())
    };
    let head = |[layer, head]: [usize; 2]| TraceHead { layer, head };
    Some(read().and_then(|link| {
        let selection = Selection {
            token: link.token,
            kda: link.kda.map(head),
            mla: link.mla.map(head),
        };
        Ok((link.chat.known()?, selection))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{Chat, Turn};
    use crate::session::ChatId;

    fn chat(answer: &str) -> KeptChat {
        let mut chat = Chat::new(ChatId(1), "be brief");
        chat.conversation.take("What?", answer, vec![1, 2, 3], 2);
        chat.turns.push(Turn {
            question: "What?".to_owned(),
            answer: answer.to_owned(),
            ..Turn::default()
        });
        KeptChat::of(&chat)
    }

    #[test]
    fn a_link_has_the_chat_and_the_selection() {
        let selection = Selection {
            token: Some(1),
            kda: Some(TraceHead { layer: 2, head: 1 }),
            mla: None,
        };
        let text = encode(chat("3 → 7"), &selection).unwrap();
        assert!(text.bytes().all(|byte| byte.is_ascii_graphic()), "{text}");
        let (again, selected) = decode(&text).unwrap().unwrap();
        assert_eq!((again, selected), (chat("3 → 7"), selection));
        assert!(decode(&text[..text.len() - 3]).unwrap().is_err());
        assert!(decode("elsewhere").is_none());
    }

    #[test]
    fn a_long_chat_is_refused() {
        let refused = encode(chat(&"long ".repeat(8000)), &Selection::default());
        assert!(refused.unwrap_err().contains("too long for a link"));
    }
}
