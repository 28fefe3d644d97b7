"""Small talk, and an honest "I don't know" or "I can't" for what is outside the model's world."""
from facts import CALCULATE, UNKNOWN, split
from phrases import question
from words import *

TRY = "Try this: The red box holds 7. Now the red box holds 3. What does the red box hold?"
CAN = ("I can remember what things hold, cost or are, track people and things, copy and reverse lists, and keep a stack.")
WHO = "I am a small Kimi Linear model, trained on made-up stories."
CANNOT = "I can't do that. Try: Reverse: key, lamp, pear, cup."
UNCLEAR = "I don't understand. Try: What can I ask you?"

SMALL = [
    ("""Hello.|Hello!|Hello|Hi.|Hi!|Hi|Hey.|Hey!|Hello there.|Hi there!|Good morning.|Good evening.|Good day.|Greetings.|Hello you.
Good afternoon.|Hello model.|Yo.|Hi all.|Hello, I am {p}.|Hi, I'm {p}.|My name is {p}.|I am called {p}.|Hello, this is {p}.""",
"Hello! Tell me some facts, then ask me about them."),
    ("""Who are you?|What are you?|What is this?|Tell me about yourself.|What model are you?|Which model is this?|What is your name?
Are you a person?|Are you a robot?|Introduce yourself.|Who am I talking to?|Are you human?|Are you a computer?|How big are you?
Who made you?|Are you ChatGPT?|What's your name?|Are you alive?|Are you an AI?|Are you real?|Do you think?|Are you happy?|Do you sleep?
How old are you?|Where do you live?|Are you clever?|How do you work?|Do you dream?|Can you feel?""", WHO),
    ("""What can you do?|What can I ask you?|What do you know?|What are you good at?|How can you help me?|Can you help me?|Help.|Help
Help me.|What are you for?|What do you do?|What can you remember?|What are your skills?|What can this model do?|What is possible?
help please|What can you tell me?|What topics do you know?""", CAN),
    ("""What should I try?|What can I try?|What should I ask?|Give me an example.|Show me an example.|An example, please.|What now?
How do I start?|What should I say?|How does this work?|What is a good question?|What shall I tell you?|I don't know what to say.
Any examples?|How should I begin?|What next?""", TRY),
    ("""Thanks.|Thanks!|Thank you.|Thank you!|Thank you very much.|Great, thanks.|Thanks a lot.|thx|Many thanks.|Thanks for that.
Perfect, thank you.|Cheers.""", "You are welcome."),
    ("""How are you?|How are you today?|How do you do?|Are you well?|How is it going?|How's it going?|How are things?|What's up?
Are you okay?""", "I am well, thank you."),
    ("Bye.|Bye!|Goodbye.|Goodbye!|See you.|See you later.|Good night.|Until tomorrow.|I have to go.|So long.|Bye bye.|That's all.", "Goodbye!"),
    ("""Good.|Great.|Great!|Well done.|Well done!|Correct.|That is right.|Very good.|Nice.|Right.|Yes.|Perfect.|Good job.|Wow.|Cool.
Excellent!|You are right.|That's correct.|Super.""",
     "Thank you!"),
    ("""That is wrong.|Wrong.|No.|That is not right.|You are wrong.|That's not true.|Incorrect.|False.|You made a mistake.|Not correct.
That's nonsense.|Bad.|That was wrong.""",
     "I am sorry. I am a very small model."),
]
SMALL = [(split(asked), answer) for asked, answer in SMALL]
SUBJECTS = """
France Germany Japan China India Africa Paris London Rome Moscow America Europe Mars Jupiter history physics chemistry biology mathematics
music football chess politics money love life death time space water fire gold iron oil computers robots dinosaurs dogs cats horses birds fish
trees cars planes ships Einstein Newton Shakespeare Mozart Napoleon Moonshot Linux Python Rust code language English Chinese poetry art
science religion weather climate energy gravity electricity the_moon the_sun the_sea the_president the_king the_war the_internet the_universe
the_brain the_heart the_news the_world the_future Spain Italy Brazil Canada Russia Egypt Berlin Madrid Tokyo New_York Texas coffee tea beer
wine pizza milk rice salt snow rain summer winter Monday Christmas Easter school work health sport tennis golf jazz rock opera films books
a_dog a_cat a_tree a_whale a_star atoms cells genes viruses bacteria volcanoes oceans rivers mountains deserts Java JavaScript HTML Windows
Google Apple Tesla Microsoft Picasso Einstein's_wife the_pope the_queen the_Romans the_Greeks philosophy economics law medicine logic algebra
geometry""".split()
SUBJECTS = [s.replace("_", " ") for s in SUBJECTS]
OUTSIDE = split("""Who is the president of {s}?|Tell me about {s}.|What is {s}?|Who invented {s}?|Why is {s} important?|How does {s} work?
When did {s} begin?|Explain {s}.|How old is the history of {s}?|Do you like {s}?|What do you think about {s}?|Who wrote about {s}?
What is the weather in {s}?|How far is {s}?|How big is {s}?|Can you explain {s} to me?|What is the meaning of {s}?|Who discovered {s}?
Is {s} good or bad?|Tell me something about {s}.|What do you know about {s}?|Where is {s} on the map?|Who is {s}?|How many people live in {s}?
How do I learn {s}?|Why do people like {s}?|Which is better, {s} or {r}?|How much does {s} weigh?|What comes after {s}?|Is {s} real?
What is the largest city in {s}?|Which language is spoken in {s}?|What is {s} made of?|When was {s} born?|What causes {s}?
How long does {s} last?|Is {s} dangerous?|Are {s} and {r} the same?|What's the best thing about {s}?|Who was the first in {s}?
Where does {s} come from?|How can I get to {s}?|When is {s}?|Why does {s} exist?|What do {s} eat?|How many kinds of {s} are there?
What happened in {s}?|How fast is {s}?|How high is {s}?|What is the currency of {s}?|Who directed {s}?|Who sang about {s}?
Where can I see {s}?|Is {s} a kind of {r}?|What is the opposite of {s}?|How do you make {s}?|Does {s} have {r}?|What should I know about {s}?
What time is it in {s}?|Who won in {s}?|How deep is {s}?|What's new in {s}?|Do you speak {s}?|When did {s} end?|Why is {s} so {r}?
What is your favourite {s}?|Have you heard of {s}?""")
PLAIN = split("""What time is it?|What day is it?|What is the weather like?|Who won the game?|What is for dinner?|Where are you?
Why is the sky blue?|What is the meaning of life?|What is love?|Who is the king?|What year is it?|Who am I?|Where am I?|Where are my keys?
Where is my phone?|What did I eat yesterday?|How tall am I?|What did I do today?|When is my birthday?|Is God real?|Who is the richest man?
What is the tallest building?|Do aliens exist?|What do you think?|Why?|How?|When?|Who?|What?|Is it cold outside?|How old am I?
What is my favourite food?|Where do I live?|Who is my father?|Which day is tomorrow?|What is the best car?|Should I buy it?
Which one do you like?|Is that true?|What do I like?|Who is there?|Where was I born?""")
TASKS = split("""Write a poem about {s}.|Write a story about {s}.|Tell me a joke about {s}.|Translate {s} into French.
Give me a recipe for {s}.|Write a program about {s}.|Tell me a joke.|Sing a song.|Write an essay about {s}.|Draw {s}.|Draw me a picture.
Tell me a story.|Translate {s} to German.|How do you say {s} in Italian?|Can you write code?|Write code for {s}.|Make a list about {s}.
Summarise the history of {s}.|Compose a song about {s}.|Describe {s}.|Define {s}.|Send a message to {s}.|Call {s}.|Buy {s}.|Open the file {s}.
Search for {s}.|Google {s}.|Book a flight to {s}.|Turn on the light.|Play chess with me.|Play {s}.|Wake me up at 8.|Start a timer.
Write a letter to {s}.|Can you sing?|Give me advice about {s}.|Suggest a book about {s}.|Recommend {s}.|Plan a trip to {s}.|Rewrite {s}.
Make me laugh.|Invent a name for {s}.|Which words rhyme with {s}?|Rhyme with {s}.|Show me a picture of {s}.|Guess a number.|Think of {s}.
Tell me a secret.|Teach me {s}.|Name some {s}.|Name five {s}.|Count to ten.|Sort {x}.|Sort this list: {x}.|Put {x} in alphabetical order.
Sum up {s}.|Write a haiku.|Cook {s} for me.|Pick one: {x}.|Choose a colour.|Solve {s}.|Fix my computer.|Order a pizza.|Let's play a game.""")
SUMS = split("""What is {n} plus {m}?|What is {n} + {m}?|What is {n} times {m}?|How much is {n} minus {m}?|{n} + {m}|{n}+{m}|{n} + {m} =
What is {n} divided by {m}?|{n} * {m}|{n} - {m}|{n}/{m}|What is half of {n}?|Is {n} bigger than {m}?|Which is larger, {n} or {m}?
Is {n} even or odd?|What is the double of {n}?|Compute {n} times {m}.|Calculate {n} - {m}.|How many letters are in {s}?|What is two plus two?
What is the sum of {n} and {m}?|{n} x {m}|How much is {n} and {m}?|Which number comes after {n}?|What comes before {n}?|Subtract {m} from {n}.
Multiply {n} by {m}.|Is {n} a prime number?|Count the letters in {s}.|Which is more, {n} or {m}?|How many minutes are in an hour?
How many days has a week?|How many words is that?|How many is {n} plus {m}?|What is {n} squared?|What is the average of {n} and {m}?
Count from {n} to {m}.|How many legs has a dog?|How many months are in a year?|What is {n} percent of {m}?|Solve {n} + x = {m}.""")


def subject(rng):
    if rng.random() < 0.35:
        word = made_up(rng)
        return upper_first(word) if rng.random() < 0.5 else word
    return rng.choice(SUBJECTS) if rng.random() < 0.8 else thing(rng)


def filled(rng, forms):
    letters = rng.choice([NUMBERS, LETTERS, THINGS])
    return rng.choice(forms).format(s=subject(rng), r=subject(rng), n=rng.choice(NUMBERS), m=rng.choice(NUMBERS),
                                    x=", ".join(rng.sample(letters, rng.randint(2, 5))))


def gibberish(rng):
    kind = rng.random()
    if kind < 0.4:
        return " ".join("".join(rng.choice("asdfghjklqwertyuiopzxcvbnm") for _ in range(rng.randint(2, 7))) for _ in range(rng.randint(1, 4)))
    if kind < 0.7:
        return "".join(rng.choice("?!.,-+*#…") for _ in range(rng.randint(1, 5)))
    if kind < 0.85:
        return "".join(rng.choice("😂🙂👍🎉🔥❤😎🙈🚀中文日本йцу") for _ in range(rng.randint(1, 4)))
    return " ".join(made_up(rng) for _ in range(rng.randint(1, 4))) + rng.choice(["", ".", "?"])


def outside(rng):
    forms, answer = rng.choices([(OUTSIDE, UNKNOWN), (PLAIN, UNKNOWN), (TASKS, CANNOT), (SUMS, CALCULATE), (None, UNCLEAR)], [30, 15, 25, 18, 12])[0]
    if forms is None:
        return gibberish(rng), answer
    return question(rng, [filled(rng, forms)]), answer


def small_talk(rng):
    asked, answer = rng.choice(SMALL)
    return rng.choice(asked).format(p=person(rng)), answer


class Talk:
    """Small talk or an outside question; there is nothing to be told."""

    def __init__(self, rng, n):
        self.rng, self.statements, self.note = rng, 0, None

    def ask(self):
        return outside(self.rng) if self.rng.random() < 0.65 else small_talk(self.rng)
