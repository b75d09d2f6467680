"""English wording of the story world.

Slots: {hero} {friend} names; {kind} {fkind} what they are; {he} {him} {his} {He} {His} the hero's pronouns; {live}
where the hero lives ("near the river"); {at} where things happen ("by the river"); {obj} the object,
{c} its color. The friend
has no pronouns, so that "he" and "she" always mean the hero.
"""

NAMES = {"he": ("Tom", "Ben", "Max", "Leo", "Sam", "Jack"), "she": ("Mia", "Lily", "Anna", "Lucy", "Ella", "Ruby")}
KINDS = {
    "rabbit": "rabbit",
    "bear": "bear",
    "fox": "fox",
    "cat": "cat",
    "dog": "dog",
    "duck": "duck",
    "mouse": "mouse",
    "frog": "frog",
    "pig": "pig",
    "sheep": "sheep",
    "horse": "horse",
    "squirrel": "squirrel",
    "boy": "boy",
    "girl": "girl",
}
PLACES = {
    "forest": ("near the forest", "in the forest"),
    "river": ("near the river", "by the river"),
    "park": ("near the park", "in the park"),
    "farm": ("on a farm", "on the farm"),
    "school": ("near the school", "at school"),
    "hill": ("near a hill", "on the hill"),
    "lake": ("near the lake", "by the lake"),
    "garden": ("near a big garden", "in the garden"),
    "village": ("in a village", "in the village"),
    "sea": ("near the sea", "by the sea"),
}
OBJECTS = {
    "kite": "kite",
    "ball": "ball",
    "hat": "hat",
    "scarf": "scarf",
    "drum": "drum",
    "boat": "toy boat",
    "clock": "clock",
    "car": "toy car",
    "key": "key",
    "bell": "bell",
    "book": "book",
    "umbrella": "umbrella",
    "lamp": "lamp",
    "cake": "cake",
    "flower": "flower",
    "bridge": "bridge",
}
COLORS = ("red", "blue", "yellow", "green", "white")

OPENINGS = (
    "Once upon a time, there was a little {kind} named {hero} who lived {live}.",
    "Once upon a time, a little {kind} named {hero} lived {live}.",
    "There was once a little {kind} named {hero}, whose home was {live}.",
    "A little {kind} named {hero} lived {live}.",
)
FRIENDS = (
    "{hero} had a good friend, a {fkind} named {friend}.",
    "{His} best friend was a {fkind} named {friend}.",
    "{He} liked to play with {his} friend {friend}, a {fkind}.",
)
ENDINGS = ("From that day on, ", "After that day, ", "From then on, ")
LESSONS = (
    "{hero} and {friend} always helped each other.",
    "{hero} and {friend} were the best of friends.",
    "{hero} and {friend} played together every day.",
    "{hero} knew that a good friend is the best thing in the world.",
)

# plot -> the sentences in order; each entry lists its wordings.
PLOTS = {
    "lost": (
        ("One day, {hero} lost {his} {c} {obj} {at}.", "One morning, {hero} could not find {his} {c} {obj} {at}."),
        ("{He} looked everywhere, but it was not there.", "{He} looked here and there, but {he} saw nothing."),
        ("{hero} sat down and felt very sad.", "{hero} was so sad that {he} cried."),
        ('"Do not cry. I will help you," said {friend}.', '"Let us look for it together," said {friend}.'),
        ("They looked behind the trees and under the big stones.", "They walked slowly and looked at every bush."),
        ("At last, {friend} saw the {obj} under a bush.", "Then {friend} found the {obj} in the tall grass."),
        ('{hero} laughed and said, "Thank you, my friend!"', "{hero} was very happy and thanked {friend}."),
    ),
    "tree": (
        ("One windy day, the two friends played with a {c} {obj} {at}.", "One windy day, {hero} took {his} {c} {obj} and played {at}."),
        ("The wind was strong, and the {obj} flew up into a tall tree.", "Suddenly the wind took the {obj} and put it in a tall tree."),
        ("{hero} jumped and jumped, but the tree was too tall.", "{He} tried to reach it, but {he} was too small."),
        ("Then {friend} had a good idea.", '"I have an idea," said {friend}.'),
        ("{hero} stood on the back of {friend} and held up a long stick.", "{friend} held {him} up, and {he} used a long stick."),
        ("The {obj} fell down, and both of them laughed.", "Down came the {obj}, and the two friends danced with joy."),
    ),
    "rain": (
        ("One day, dark clouds came and it began to rain {at}.", "One afternoon, it rained hard {at}."),
        ("{hero} had a big {c} umbrella, so {he} was warm and dry.", "{hero} opened {his} big {c} umbrella and walked home."),
        ("Under a tree, {he} saw {friend}, all wet and cold.", "On the way, {he} saw {friend} standing in the rain."),
        ('"I have no umbrella," said {friend}.', '"I cannot go home in this rain," said {friend}.'),
        ('"Come here. My umbrella is big enough for two," said {hero}.', '"Come and walk with me," said {hero}.'),
        ("They walked home together and sang a song in the rain.", "They went home side by side and drank hot tea."),
    ),
    "dark": (
        ("One day, the two friends played {at} for a long time.", "One day, {hero} and {friend} went for a long walk {at}."),
        ("Soon the sun went down, and it was very dark.", "Night came, and they could not see the way home."),
        ("{hero} was afraid of the dark and began to cry.", "{hero} held the hand of {friend} because {he} was afraid."),
        ('"Do not be afraid. I have a small lamp," said {friend}.', '"Look, I have a {c} lamp in my bag," said {friend}.'),
        ("The lamp gave a warm light, and they could see the road.", "{hero} held the lamp high, and the road was bright."),
        ("They walked slowly and came home safely.", "Step by step they walked, and soon they were home."),
    ),
    "share": (
        ("One morning, {hero} made a big cake.", "One day, the mother of {hero} gave {him} a big cake."),
        ("{He} took the cake and sat down {at} to eat it.", "{He} wanted to eat it all alone {at}."),
        ("Then {friend} came by and looked very hungry.", "Just then {friend} came, tired and hungry."),
        (
            '{hero} thought for a while: "The cake is big, and my friend has nothing."',
            "{hero} looked at the cake and then at {his} friend.",
        ),
        ('"Here, half of it is for you," said {hero}.', "{He} cut the cake and gave one half to {friend}."),
        ("They ate together, and the cake was sweeter than ever.", "They sat side by side and ate, and both were happy."),
    ),
    "seed": (
        ("One spring day, {hero} put a small seed into the ground {at}.", "In spring, {hero} found a small seed and planted it {at}."),
        ("Every day {he} gave it water, but nothing came up.", "{He} waited for many days, but {he} saw no leaf at all."),
        ('"It will never grow," said {hero}, and {he} wanted to go away.', "{hero} was sad and wanted to give up."),
        ('"Wait a little. A seed needs time," said {friend}.', '"Do not give up. Let us wait together," said {friend}.'),
        ("So they watered it and sang to it day after day.", "The two friends came every morning with fresh water."),
        ("One morning, a beautiful {c} flower opened in the sun.", "At last, a {c} flower looked up at the sun."),
    ),
    "broken": (
        ("One day, {hero} played with the {c} {obj} of {friend}.", "{friend} had a {c} {obj}, and {hero} liked to play with it."),
        ("{He} was not careful, and the {obj} fell down and broke.", "Suddenly it fell on a stone {at} and broke."),
        ("{hero} was afraid and wanted to hide it.", '"What should I do now?" thought {hero}.'),
        ("But then {he} went to {friend} and told the truth.", '{He} ran to {friend} and said, "I am sorry. I broke it."'),
        ('{friend} was not angry and said, "Thank you for telling me."', '"It is good that you told me," said {friend}.'),
        ("They worked together, and soon the {obj} was as good as new.", "The two friends mended the {obj} in one afternoon."),
    ),
    "found": (
        ("One day, {hero} found a {c} {obj} on the road {at}.", "One morning, {hero} saw a {c} {obj} {at}."),
        ("It was so pretty that {he} wanted to keep it.", '"How pretty! I want to have it," thought {hero}.'),
        ("Then {he} saw {friend}, who was looking for something.", "A little later {friend} came and looked sad."),
        ('"I lost my {obj}," said {friend} in a low voice.', '"Have you seen my {obj}?" asked {friend}.'),
        ('{hero} gave it back at once and said, "Here it is!"', "{hero} put the {obj} into the hand of {friend}."),
        ("{friend} was so happy and gave {him} a big hug.", "{friend} smiled and thanked {him} again and again."),
    ),
    "bridge": (
        ("One day, the two friends came to a deep stream {at}.", "One day, {hero} and {friend} wanted to cross a stream {at}."),
        ("There were sweet fruits on the other side, but there was no bridge.", "The water was cold and fast, and they saw no bridge."),
        ("{hero} could not jump so far, and {he} felt sad.", '"We can never get over," said {hero}.'),
        ('"We can make a bridge with that old tree," said {friend}.', "Then {friend} saw a fallen tree and had an idea."),
        ("{hero} pushed and {friend} pulled with all their strength.", "They pushed the tree together, one, two, three!"),
        ("Soon they had a fine bridge and walked over it, laughing.", "The tree became a bridge, and they ran to the other side."),
    ),
    "race": (
        ("One day, {hero} and {friend} had a race {at}.", "One sunny day, the two friends ran a race {at}."),
        ("{hero} was very fast and ran in front.", "At first {hero} ran like the wind."),
        ("Suddenly {friend} fell down and hurt one foot.", "Then {he} heard a cry: {friend} lay on the ground."),
        ("{hero} could win now, but {he} stopped and turned back.", "{hero} did not think of the race any more and ran back."),
        ('"Hold on to me. We will go together," said {hero}.', "{He} helped {friend} to stand up again."),
        ("They came to the end side by side, and everyone cheered.", "They walked to the end together, so both of them won."),
    ),
    "learn": (
        ("{hero} wanted to learn to {skill}, but it was hard.", "One day, {hero} saw {friend} {skill} and wanted to learn it too."),
        ("The first time, {he} could not do it, and {he} felt sad.", "{He} tried once and tried again, but it did not go well."),
        ('"I am not good at it," said {hero}.', '"I will never learn it," said {hero} and sat down {at}.'),
        ('"Try it once more. I will show you," said {friend}.', '"Nobody can do it on the first day," said {friend}.'),
        ("So they came back {at} every day to practice.", "Day after day they practiced together."),
        (
            "One day, {hero} could {skill} very well, and {he} laughed with joy.",
            "At last {he} could do it, and {friend} cheered for {him}.",
        ),
    ),
    "sick": (
        ("One winter day, {friend} was sick and could not go out.", "One morning, {friend} did not come to play {at}."),
        ("{hero} heard that {friend} had to stay in bed.", "{hero} went to the house and saw {friend} in bed."),
        ("{He} wanted to do something good for {his} friend.", '"What can I do?" thought {hero}.'),
        ("So {he} brought a {c} {obj} and some hot soup.", "{He} ran home and came back with a {c} {obj}."),
        ('"This is for you," said {hero}. "Get well soon!"', "{hero} sat by the bed and told a funny story."),
        ("{friend} smiled, and the next day everything was fine again.", "{friend} felt much better, and soon they could play again."),
    ),
}
PLOT_LESSONS = {
    "lost": ("{hero} always took good care of {his} {obj}.",),
    "tree": ("{hero} and {friend} played where there were no trees.",),
    "rain": ("{hero} and {friend} always walked home together.",),
    "dark": ("{hero} was not afraid of the dark any more.",),
    "share": ("{hero} always shared good food with {his} friends.",),
    "seed": ("{hero} knew that good things need time.",),
    "broken": ("{hero} always told the truth.",),
    "found": ("{hero} never kept what was not {his} own.",),
    "bridge": ("{hero} knew that two can do more than one.",),
    "race": ("{hero} and {friend} always ran side by side.",),
    "learn": ("{hero} never gave up when something was hard.",),
    "sick": ("{hero} and {friend} took good care of each other.",),
}
SKILLS = ("swim", "sing", "dance", "draw", "read", "jump", "cook", "ride a bicycle")

REQUESTS = {
    "full": (
        "Tell me a story about a {kind} named {hero} {at}.",
        "Please tell me a story about a {kind} named {hero}, {at}.",
        "I want a story about {hero} the {kind}. It happens {at}.",
        "Tell me about a {kind} named {hero} {at}.",
    ),
    "hero": (
        "Tell me a story about a {kind} named {hero}.",
        "Please tell me a story about {hero} the {kind}.",
        "I want a story about a {kind} named {hero}.",
    ),
    "name": ("Tell me a story about {hero}.", "Please tell a story about {hero}.", "I want to hear a story about {hero}."),
    "kind": ("Tell me a story about a {kind}.", "Please tell me a story about a little {kind}.", "I want to hear a story about a {kind}."),
    "place": ("Tell me a story that happens {at}.", "Please tell me a story {at}.", "I want a story that happens {at}."),
    "object": ("Tell me a story with a {obj}.", "Please tell me a story about a {obj}.", "I want to hear a story about a {obj}."),
    "any": ("Tell me a story.", "Please tell me a story.", "Can you tell me a story?", "I want to hear a story.", "Tell me a short story."),
}
RESERVED = (
    "I would love to hear about {hero}, a {kind}, {at}. Tell me the story.",
    "Can you make up a story for me? It has a {kind} named {hero} in it, {at}.",
    "Story time! Let {hero} the {kind} have a day {at}.",
)
