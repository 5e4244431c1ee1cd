// Renders a chat template with llama.cpp's own engine: the template's file is the argument, the variables are JSON
// on stdin. How it is compiled and used stands in make_rendered_templates.py.

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

// What a failed check of the JSON library calls; ggml, which has it, is not linked.
extern "C" void ggml_abort(const char *, int, const char *, ...) {
    std::abort();
}

static std::string all_of(std::istream & stream) {
    return std::string(std::istreambuf_iterator<char>(stream), {});
}

int main(int, char ** argv) {
    std::ifstream file(argv[1]);
    const std::string source = all_of(file);
    try {
        jinja::lexer lexer;
        auto tokens = lexer.tokenize(source);
        auto program = jinja::parse_from_tokens(tokens);
        jinja::context context(source);
        jinja::global_from_json(context, common_json::parse(all_of(std::cin)), true);
        jinja::runtime runtime(context);
        std::cout << runtime.gather_string_parts(runtime.execute(program))->as_string().str();
    } catch (const std::exception & error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
