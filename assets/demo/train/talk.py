"""Small talk, and an honest "I don't know" for questions outside the model's world."""
from words import *

TRY = "Try this: The red box holds 7. Now the red box holds 3. What does the red box hold?"
CAN = ("I can remember what things hold, cost or are, track people and things, copy and reverse lists, and keep a stack.")
WHO = "I am a small Kimi Linear model, trained on made-up stories."
UNKNOWN = "I don't know. I only know what you tell me here."

SMALL = [
    (["Hello.", "Hello!", "Hello", "Hi.", "Hi!", "Hi", "Hey.", "Hey!", "Hello there.", "Hi there!", "Good morning.", "Good evening.",
      "Good day."], "Hello! Tell me some facts, then ask me about them."),
    (["Who are you?", "What are you?", "What is this?", "Tell me about yourself.", "What model are you?", "Which model is this?",
      "What is your name?", "Are you a person?", "Are you a robot?", "Introduce yourself.", "Who am I talking to?"], WHO),
    (["What can you do?", "What can I ask you?", "What do you know?", "What are you good at?", "How can you help me?", "Can you help me?",
      "Help.", "Help", "Help me.", "What are you for?", "What do you do?"], CAN),
    (["What should I try?", "What can I try?", "What should I ask?", "Give me an example.", "Show me an example.", "An example, please.",
      "What now?", "How do I start?", "What should I say?", "How does this work?"], TRY),
    (["Thanks.", "Thanks!", "Thank you.", "Thank you!", "Thank you very much.", "Great, thanks.", "Thanks a lot."], "You are welcome."),
    (["How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?"], "I am well, thank you."),
    (["Bye.", "Bye!", "Goodbye.", "Goodbye!", "See you.", "See you later.", "Good night."], "Goodbye!"),
    (["Good.", "Great.", "Great!", "Well done.", "Well done!", "Correct.", "That is right.", "Very good.", "Nice.", "Right."],
     "Thank you!"),
    (["That is wrong.", "Wrong.", "No.", "That is not right.", "You are wrong."], "I am sorry. I am a very small model."),
]
SUBJECTS = ("France Germany Japan China India Africa Paris London Rome Moscow America Europe Mars Jupiter history physics chemistry "
            "biology mathematics music football chess politics money love life death time space water fire gold iron oil "
            "computers robots dinosaurs dogs cats horses birds fish trees cars planes ships Einstein Newton Shakespeare Mozart Napoleon "
            "Moonshot Linux Python Rust code language English Chinese poetry art science religion weather climate energy "
            "gravity electricity the moon the sun the sea the president the king the war the internet the universe the brain "
            "the heart the news the world the future").replace("the ", "the_").split()
SUBJECTS = [s.replace("_", " ") for s in SUBJECTS]
OUTSIDE = [
    "What is the capital of {s}?", "Who is the president of {s}?", "Tell me about {s}.", "What is {s}?", "Who invented {s}?", "Why is {s} important?",
    "How does {s} work?", "When did {s} begin?", "Write a poem about {s}.", "Write a story about {s}.", "Tell me a joke about {s}.", "Explain {s}.",
    "How old is the history of {s}?", "Do you like {s}?", "What do you think about {s}?", "Who wrote about {s}?", "What is the weather in {s}?",
    "How far is {s}?", "How big is {s}?", "Can you explain {s} to me?", "What is the meaning of {s}?", "Who discovered {s}?", "Is {s} good or bad?",
    "Translate {s} into French.", "Tell me something about {s}.", "What do you know about {s}?", "Where is {s}?", "Who is {s}?",
    "How many people live in {s}?", "How do I learn {s}?", "Why do people like {s}?", "Give me a recipe for {s}.", "Which is better, {s} or {r}?",
    "Write a program about {s}.", "How much does {s} weigh?", "What comes after {s}?", "Do you remember {s}?", "Is {s} real?",
]
PLAIN = ["Tell me a joke.", "Write a poem.", "Sing a song.", "What time is it?", "What day is it?", "What is the weather like?",
         "What is two plus two?", "What is 2 + 2?", "What is 5 times 3?", "How much is 7 minus 4?", "Who won the game?", "What is for dinner?",
         "Do you dream?", "Are you alive?", "How old are you?", "Where do you live?", "Where are you?", "Who made you?", "Why is the sky blue?",
         "What is the meaning of life?", "Can you write code?", "Do you speak French?", "What is love?", "Who is the king?", "What year is it?"]
SYLLABLES = ("ba be bi bo ca ce co da de di do fa fe fi fo ga ge go ha he hi ho ja jo ka ke ki ko la le li lo lu ma me mi mo na ne ni no "
             "pa pe pi po ra re ri ro sa se si so ta te ti to va ve vi wa we za zo n r s t l").split()


def made_up(rng):
    word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))
    return upper_first(word) if rng.random() < 0.5 else word


def subject(rng):
    return made_up(rng) if rng.random() < 0.4 else rng.choice(SUBJECTS)


def outside(rng):
    if rng.random() < 0.25:
        return rng.choice(PLAIN), UNKNOWN
    return rng.choice(OUTSIDE).format(s=subject(rng), r=subject(rng)), UNKNOWN


def small_talk(rng):
    asked, answer = rng.choice(SMALL)
    return rng.choice(asked), answer


class Talk:
    """Small talk or an outside question; there is nothing to be told."""

    def __init__(self, rng, n):
        self.rng, self.statements = rng, 0

    def ask(self):
        return outside(self.rng) if self.rng.random() < 0.5 else small_talk(self.rng)
