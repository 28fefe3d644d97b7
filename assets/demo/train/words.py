"""The words of the demo model's world, and helpers to draw from them.

A word comes from the short list of its kind, from the long one, or is made up: two halves of words of the list, or syllables. So a name is
something to be copied, not something known. No name of `../questions.jsonl` is in a list (`questions.py check`).
"""
import random, re

PEOPLE = "Anna Ben Carl Dora Finn Greta Hugo Ida Jack Kate Mary Nina Oscar Paul Rosa Sam Tom Alice Bob John Eve Max".split()
MORE_PEOPLE = """
Aaron Abdul Abigail Ada Adam Adele Adrian Agnes Ahmed Aidan Akira Alan Albert Alejandro Alex Alfred Ali Alicia Alma Alvin Amanda Amara Amir
Amy Ana Andre Andrea Andrew Angela Anita Anton Antonia Anya Arjun Arthur Asha Astrid Audrey Axel Barbara Barry Beatrice Bella Bernard Beth
Betty Bill Björn Boris Brenda Brian Bridget Bruce Caleb Cameron Camille Carla Carlos Carmen Carol Caroline Catherine Cecilia Charles Charlie
Charlotte Chloe Chris Christine Claire Claudia Colin Connor Cora Cynthia Cyrus Daisy Dan Daniel Daphne David Deborah Deepak Dennis Derek Diana
Dmitri Dominic Donna Doris Dorothy Duncan Dylan Edgar Edith Edward Elena Eli Elias Elisa Elizabeth Ella Ellen Elliot Elsa Emil Emily Enzo Eric
Erika Ernest Esther Ethan Eva Evelyn Fabian Farah Fiona Florence Frances Frank Fred Frida Gabriel Gail Gary Gavin Gemma George Georgia Gerald
Gina Giovanni Gloria Gordon Grace Graham Gregory Gus Gustav Hamza Hana Hans Harold Harriet Harry Hassan Hazel Heather Hector Heidi Helen Helga
Henry Hilda Holly Howard Ian Ibrahim Igor Ines Iris Irene Isaac Isabel Ismael Ivan Ivy Jacob Jade James Jamal Jan Jane Janet Jasmine Jason
Javier Jean Jeff Jenny Jerome Jesse Jessica Jill Jim Jin Joan Joanna Joe Jonas Jonathan Jorge Joseph Josephine Joshua Joyce Juan Judith Julia
Julian Juliet June Kai Karen Karim Karl Katya Keith Kelly Ken Kenji Kevin Kim Kira Klaus Kyle Lana Lars Laura Lauren Layla Leah Lee Leila Leon
Leonard Leroy Lewis Li Lily Linda Ling Lola Lorenzo Louis Louise Lucas Lucia Lucy Luigi Luis Luna Lydia Mabel Magnus Malik Marcus Margaret
Maria Marie Mario Mark Marta Martha Martin Marvin Maya Megan Mei Melissa Mercy Michael Miguel Mike Mila Milo Mina Miriam Mohammed Molly Monica
Morgan Nadia Nadine Nancy Natalie Nathan Neil Nelson Nicholas Nico Nicole Nigel Nils Nora Norman Olaf Oliver Olivia Otto Owen Pablo Pamela
Pascal Patricia Patrick Paula Pedro Penny Petra Philip Phoebe Pierre Polly Quentin Rachel Ralph Ramon Randy Raphael Rebecca Renata Rhea Rita
Robert Robin Roger Roland Roman Rosalind Rose Ruby Rupert Ruth Ryan Sabine Sally Salma Samir Sandra Sara Sarah Sasha Scott Sean Selma Sergei
Seth Shirley Sidney Silvia Simon Sonia Stella Stephen Steve Susan Suki Sven Sylvia Tamara Tanya Tara Ted Teresa Theo Thomas Tim Tina Toby Tony
Tracy Uma Ursula Vera Victor Vikram Vincent Viola Violet Virginia Vivian Wanda Walter Wei Wendell William Winston Xavier Yan Yara Yolanda
Yvonne Zack Zainab Zara""".split()
PLACES = "kitchen garden hall office cellar attic bathroom bedroom garage park school shop library station barn tower".split()
MORE_PLACES = """
airport alley arcade arena bakery balcony bank bar basement beach bridge cabin cafe camp canteen cave chapel church cinema classroom clinic
closet club college corridor cottage court courtyard den dock dungeon factory farm field forest fort gallery greenhouse gym harbour hospital
hotel house hut island jungle lab lake lobby lounge mall mansion market meadow mill mine mosque museum nursery palace pantry pharmacy pier
plaza pool porch port pub restaurant river roof sauna shed stable stadium stairwell store street studio study swamp temple tent terrace
theatre town tunnel valley village vineyard ward warehouse waterfall well wood workshop yard zoo""".split()
THINGS = ("apple key lamp ball book cup coin hat map pen ring rope shoe spoon stone watch knife letter bottle egg orange umbrella candle bell flower "
          "toy brush card pear fork").split()
MORE_THINGS = """
anchor axe backpack badge bandage banana banjo battery belt biscuit blanket bolt bone boot bow bracelet brick broom button cable cake calendar
camera cap carrot chain cheese chisel chocolate clock coat comb compass computer cookie cork crayon crystal cushion dagger diamond dice diary
dish doll dress drum envelope eraser fan feather file flag flashlight flute folder gem gift glass glove guitar hammer handbag harp headphone
helmet hook horn iron jacket jewel kettle kite ladder laptop leaf lemon lens lid lighter lock magnet mango marble mask match medal melon menu
microphone mirror mug nail necklace needle newspaper notebook nut onion oyster paddle painting pan paper passport peach pearl pebble pencil
phone photo piano picture pill pillow pin pipe pizza plant plum poster potato puppet purse puzzle radio razor ribbon robot ruler sandwich saw
scarf scissors screw shell shield shirt shovel skirt sock sponge stamp stick sticker strawberry string sword tablet tape telescope ticket tie
tomato tool torch towel trumpet vase wallet whistle wig wire wrench yo-yo""".split()
ANIMALS = "lizard horse cow sheep goat pig duck fox wolf frog mouse rabbit turtle snake owl parrot whale shark bee ant monkey camel donkey".split()
COLOURS = "red blue green yellow black white pink brown grey purple".split()
MORE_COLOURS = "violet gold gray silver cyan crimson beige ivory turquoise magenta maroon olive scarlet indigo lilac bronze amber teal navy tan".split()
KINDS_OF_BOX = "box bag jar drawer basket chest bucket pot".split()
MORE_BOXES = """
barrel bin bowl briefcase cabinet can carton case crate cupboard dish envelope flask folder fridge hamper jug locker mug pail parcel pocket
pouch purse sack safe shelf tank tray trunk tub vase vault wardrobe""".split()
ADJECTIVES = """
big small large little tiny huge old new first second third last left right top bottom wooden metal plastic paper round square heavy light
open closed dirty clean broken""".split()
COLOURED = "door car house wall chair table boat bike fence flag".split()
MORE_COLOURED = """
balloon bench blouse bus carpet ceiling curtain desk floor hair kite paint pencil plane rocket roof rose rug ship sofa sweater tent tractor
train tree truck van wagon window""".split()
LABELS = "code password answer number total score".split()
MORE_LABELS = "age limit pin level rank size weight temperature height speed target result key width row page seat room bus platform".split()
NUMBERS = [str(i) for i in range(100)]
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

DISTRACTORS = [
    "The sky is clear.", "It is Monday.", "The dog sleeps.", "It rains today.", "The cat looks out.", "The sun is warm.", "A bird sings.",
    "It is late.",
    "The wind is cold.", "The music is loud.", "The train is late.", "The clock ticks.", "It is quiet here.", "The soup is hot.", "I am tired.",
    "That is nice.", "What a day!", "I like tea.", "We have time.", "Let me think.", "Hm.", "OK.", "Listen.", "Nothing else happens.",
    "So far so good.",
]
SYLLABLES = ("ba be bi bo bra ca ce co chi cla da de di do dra fa fe fi fo ga ge go gri ha he hi ho ja jo ju ka ke ki ko kra la le li lo lu ma me mi mo mu na "
             "ne ni no nu pa pe pi po pri ra re ri ro ru sa se si so sha ste ta te ti to tho tu va ve vi wa we ya yo yu za ze zo an en in on ar er or al el "
             "un us is as ia ea ie oo ee ch sh th n r s t l m k d").split()
VOWELS = "aeiou"


def halves(words):
    """The beginnings and the ends of words, cut after a vowel."""
    starts, ends = [], []
    for word in words:
        cuts = [i for i in range(2, len(word) - 1) if word[i - 1].lower() in VOWELS]
        starts += [word[:i].lower() for i in cuts]
        ends += [word[i:].lower() for i in cuts]
    return sorted(set(starts)), sorted(set(ends))


NAME_HALVES = halves(PEOPLE + MORE_PEOPLE)
NOUN_HALVES = halves(PLACES + MORE_PLACES + THINGS + MORE_THINGS + KINDS_OF_BOX + MORE_BOXES + ANIMALS)


def made_up(rng, parts=NOUN_HALVES):
    if rng.random() < 0.6:
        return rng.choice(parts[0]) + rng.choice(parts[1])
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice([1, 2, 2, 2, 3]))) + rng.choice(["", "a", "o", "n", "y"])


def draw(rng, few, many, parts=NOUN_HALVES, shares=(0.5, 0.35, 0.15)):
    where = rng.choices([few, many, None], shares)[0]
    return rng.choice(where) if where else made_up(rng, parts)


def person(rng):
    name = draw(rng, PEOPLE, MORE_PEOPLE, NAME_HALVES, (0.3, 0.4, 0.3))
    return name if name[0].isupper() else upper_first(name)


def thing(rng):
    return draw(rng, THINGS, MORE_THINGS)


def place(rng):
    return draw(rng, PLACES, MORE_PLACES)


def colour(rng):
    return draw(rng, COLOURS, MORE_COLOURS, shares=(0.7, 0.25, 0.05))


def container(rng):
    return draw(rng, KINDS_OF_BOX, MORE_BOXES, shares=(0.65, 0.25, 0.1))


def adjective(rng):
    return colour(rng) if rng.random() < 0.75 else draw(rng, ADJECTIVES, ADJECTIVES, shares=(0.5, 0.4, 0.1))


def several(draw_one, rng, n, taken=()):
    """n different words."""
    out = []
    while len(out) < n:
        word = draw_one(rng)
        if word not in out and word not in taken:
            out.append(word)
    return out


def a(noun):
    """The noun with its indefinite article."""
    return ("an " if noun[0] in VOWELS else "a ") + noun


def upper_first(text):
    return text[0].upper() + text[1:]


QUESTION_WORDS = set("What Where Who Which How Is Does Do Has Can Could Whose Whom With By To Why When Tell Say Give Find Show Open Look Check".split())
STARTS = set("The There A An In Now Then It His Her My Your Some Someone Nothing Inside First Today Also He She At Let Set Put We You With After Next Later "
             "Finally Into As For From Make Remember Suppose Well So Listen Note Besides".split())


def lower_first(text):
    """The sentence as it stands after other words: names and `I` keep their capital."""
    word = re.match(r"[A-Za-z]*", text)[0]
    return text[0].lower() + text[1:] if word in STARTS or word in QUESTION_WORDS else text



def listing(items):
    """`x`, `x and y`, `x, y and z`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
